"""Attention by kernels equals attention by tiles: outputs, the indexer's loss, all gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone import indexer, tiles, visible
from posttrain.backbone.kernels import attend as kernel

WINDOW, SCALE, HEADS, SIZE = 3, 0.4, 2, 8
Parts = dict[str, Tensor]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def draw(docs: int, length: int, num_past: int, num_entries: int, device: torch.device) -> Parts:
    generator = torch.Generator().manual_seed(length)
    sizes = {
        "q": (docs, length, HEADS, SIZE),
        "window": (docs, num_past + length, SIZE),
        "entry": (docs, num_entries, SIZE),
        "sink": (HEADS,),
        "query": (docs, length, 16, 4),
        "key": (docs, num_entries, 4),
        "weight": (docs, length, 16),
    }
    return {
        name: torch.randn(size, generator=generator).to(device).requires_grad_()
        for name, size in sizes.items()
    }


def compare(parts: Parts, layout: visible.Layout, top_k: int | None) -> None:
    """`top_k` None: a layer without an indexer."""
    found, wanted = (
        run(attend, {name: x.detach().requires_grad_() for name, x in parts.items()}, layout, top_k)
        for attend in (kernel.attend, tiles.attend)
    )
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-4, msg=name)


def run(attend: Attend, p: Parts, layout: visible.Layout, top_k: int | None) -> Parts:
    """Outputs and gradients by name."""
    index = None
    if top_k is not None:
        index = indexer.Index(p["query"], p["key"], p["weight"], top_k, wants_loss=True)
    keys = (p["q"], p["window"], p["entry"] if layout.rate else None, p["sink"])
    out, loss = attend(*keys, scale=SCALE, layout=layout, index=index)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    total = (out * upstream).sum() + (0 if loss is None else 2 * loss)
    grads = torch.autograd.grad(total, list(p.values()), allow_unused=True)
    named: dict[str, Any] = {f"grad of {k}": g for k, g in zip(p, grads, strict=True)}
    results = {name: grad for name, grad in named.items() if grad is not None and grad.numel()}
    return results | {"out": out.detach()} | ({} if loss is None else {"loss": loss.detach()})


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("rate", [0, 2])
def test_all_visible_entries(length: int, rate: int, device: torch.device) -> None:
    lengths = torch.tensor([length, 1], device=device)
    layout = visible.Layout(lengths, None, 0, WINDOW, 0, rate)
    compare(draw(2, length, 0, length // rate if rate else 0, device), layout, None)


def test_the_indexers_choice_and_loss(device: torch.device) -> None:
    layout = visible.Layout(torch.tensor([8, 5], device=device), None, 0, WINDOW, 0, 2)
    compare(draw(2, 8, 0, 4, device), layout, top_k=2)


def test_the_indexers_loss_where_all_entries_fit(device: torch.device) -> None:
    layout = visible.Layout(torch.tensor([6], device=device), None, 0, WINDOW, 0, 2)
    compare(draw(1, 6, 0, 3, device), layout, top_k=3)


def test_new_tokens_after_a_cache(device: torch.device) -> None:
    # two slots that hold 0 and 5 tokens: the window keys of before are in front
    start = torch.tensor([0, 5], device=device)
    layout = visible.Layout(torch.tensor([4, 4], device=device), start, 5, WINDOW, WINDOW - 1, 2)
    compare(draw(2, 4, WINDOW - 1, 4, device), layout, top_k=2)


def test_tiles_of_the_loss_add_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = visible.Layout(torch.tensor([7], device=device), None, 0, WINDOW, 0, 2)
    parts = draw(1, 7, 0, 3, device)
    whole = run(kernel.attend, parts, layout, 2)
    monkeypatch.setattr(tiles, "TILE", 4)
    for name, value in run(kernel.attend, parts, layout, 2).items():
        torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=1e-5)


def test_no_tokens_at_all(device: torch.device) -> None:
    layout = visible.Layout(torch.zeros(0, dtype=torch.long, device=device), None, 0, WINDOW, 0, 0)
    q, window = (torch.zeros(0, 0, *s, device=device) for s in ((HEADS, SIZE), (SIZE,)))
    out, loss = kernel.attend(
        q, window, None, torch.zeros(HEADS, device=device), scale=SCALE, layout=layout
    )
    assert out.shape == q.shape
    assert loss is None
