"""Attention in tiles: equal to a dense float64 softmax, forward and backward, however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backbone import indexer, tiles, visible
from posttrain.backbone.visible import Layout

WINDOW, RATE, SCALE = 5, 3, 0.4


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def layout_of(lengths: list[int], rate: int = RATE) -> Layout:
    return Layout(torch.tensor(lengths), None, 0, WINDOW, 0, rate)


def dense(q: Tensor, k: Tensor, entry: Tensor, sink: Tensor, seen_LE: Tensor) -> Tensor:
    """The equation, with every (L, L + E + 1) score written out."""
    length = q.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    in_window = (distance >= 0) & (distance < WINDOW)
    visible = torch.cat([in_window.expand(len(q), -1, -1), seen_LE], -1)
    keys = torch.cat([k, entry], dim=1)
    logits = torch.einsum("dlhx,dkx->dlhk", q, keys) * SCALE
    logits = logits.masked_fill(~visible.unsqueeze(2), float("-inf"))
    logits = torch.cat([logits, sink.view(1, 1, -1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    return torch.einsum("dlhk,dkx->dlhx", logits.softmax(-1)[..., :-1], keys)


def seen_all(length: int, num_entries: int, rate: int = RATE) -> Tensor:
    place = torch.arange(length)[:, None]
    return (torch.arange(num_entries) < (place + 1) // rate)[None]


@pytest.fixture(
    params=[(1000, 1, 99), (7, 100, 0), (7, 1, 99), (7, 1, 0), (13, 1, 0), (1, 1, 0)], ids=str
)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of so many queries, that mask or gather, and keep their weights or form them again."""
    size, gather, kept = request.param
    monkeypatch.setattr(tiles, "TILE", size)
    monkeypatch.setattr(tiles, "TILE_ROWS", 1)
    monkeypatch.setattr(tiles, "KEPT", kept)
    monkeypatch.setattr(visible, "GATHER", gather)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("length", [1, 2, 6, 23])
def test_out_and_gradients_equal_the_dense_softmax(length: int) -> None:
    q, k = draw(2, length, 3, 4, seed=1), draw(2, length, 4, seed=2)
    entry, sink = draw(2, length // RATE, 4, seed=3), draw(3, seed=4)
    out, loss = tiles.attend(q, k, entry, sink, scale=SCALE, layout=layout_of([length, 1]))
    wanted = dense(q, k, entry, sink, seen_all(length, length // RATE).expand(2, -1, -1))
    assert loss is None
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)
    upstream = draw(*out.shape, seed=5).detach()
    inputs = (q, k, entry, sink)
    found: Any = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
    for a, b in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(
            torch.zeros_like(b) if a is None else a, b, atol=1e-12, rtol=1e-9
        )


@pytest.mark.usefixtures("cut")
def test_a_layer_without_entries_attends_to_its_window() -> None:
    q, k, sink = draw(2, 19, 3, 4, seed=1), draw(2, 19, 4, seed=2), draw(3, seed=4)
    out, _ = tiles.attend(q, k, None, sink, scale=SCALE, layout=layout_of([19, 8], rate=0))
    none = torch.zeros(2, 0, 4, dtype=torch.float64)
    wanted = dense(q, k, none, sink, torch.zeros(2, 19, 0, dtype=torch.bool))
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)


def make_index(docs: int, length: int, num_entries: int, *, top_k: int) -> indexer.Index:
    return indexer.Index(
        draw(docs, length, 2, 3, seed=6),
        draw(docs, num_entries, 3, seed=7),
        draw(docs, length, 2, seed=8),
        top_k,
        wants_loss=True,
    )


@pytest.mark.usefixtures("cut")
def test_the_chosen_entries_and_the_indexers_loss_equal_the_dense_ones() -> None:
    lengths, length, top_k = [23, 17], 23, 2
    num_entries = length // RATE
    q, k = draw(2, length, 3, 4, seed=1), draw(2, length, 4, seed=2)
    entry, sink = draw(2, num_entries, 4, seed=3), draw(3, seed=4)
    index = make_index(2, length, num_entries, top_k=top_k)
    parts = (index.query, index.key, index.weight)
    out, loss = tiles.attend(q, k, entry, sink, scale=SCALE, layout=layout_of(lengths), index=index)
    assert loss is not None

    similarity = torch.einsum("dlhc,dec->dlhe", index.query, index.key).relu()
    score = (similarity * index.weight[..., None]).sum(2)
    visible = seen_all(length, num_entries).expand(2, -1, -1)
    best = score.masked_fill(~visible, float("-inf")).sort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(visible).scatter(-1, best.indices[..., :top_k], value=True) & visible
    wanted = dense(q, k, entry, sink, chosen)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)
    inputs, upstream = (q, k, entry, sink), draw(*out.shape, seed=5).detach()
    found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(wanted, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)

    distance = torch.arange(length)[:, None] - torch.arange(length)
    window = ((distance >= 0) & (distance < WINDOW)).expand(2, -1, -1)
    logits = torch.einsum("dlhx,dkx->dlhk", q, torch.cat([k, entry], 1)) * SCALE
    logits = logits.masked_fill(~torch.cat([window, chosen], -1).unsqueeze(2), float("-inf"))
    logits = torch.cat([logits, sink.view(1, 1, -1, 1).expand(2, length, 3, 1)], -1)
    p = logits.softmax(-1)[..., length:-1].sum(2).detach()
    total = torch.zeros((), dtype=torch.float64)
    for d, n in enumerate(lengths):
        for t in range(RATE - 1, n):
            pick = chosen[d, t]
            target = p[d, t, pick] / p[d, t, pick].sum()
            total = total + (target * (target.log() - score[d, t, pick].log_softmax(-1))).sum()
    torch.testing.assert_close(loss.double(), total, rtol=1e-6, atol=1e-9)
    wanted_grads = torch.autograd.grad(total, parts)
    for a, b in zip(torch.autograd.grad(loss, parts), wanted_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_ties_go_to_the_lowest_entry_by_hand() -> None:
    score = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    chosen = indexer.top_k_mask(score, 2)
    assert chosen[0, 0].tolist() == [False, True, True, False, False]
    assert chosen[0, 1].tolist() == [True, True, False, False, False]
    assert indexer.numbers(chosen, 3).tolist() == [[[1, 2, -1], [0, 1, -1]]]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_equals_a_stable_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (2, 9, 31), generator=generator).float()
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :7]
    wanted = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, value=True)
    assert torch.equal(indexer.top_k_mask(score, 7), wanted)
    assert torch.equal(indexer.numbers(wanted, 7), best.sort(-1).values)
    assert torch.equal(indexer.top_k_numbers(score, 7), best.sort(-1).values)
    apart = score + torch.linspace(0, 0.5, 31)  # no two alike
    wanted = apart.sort(dim=-1, descending=True).indices[..., :7].sort(-1).values
    assert torch.equal(indexer.top_k_numbers(apart, 7), wanted)


def test_the_loss_is_zero_where_the_scores_give_the_target() -> None:
    share = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 1, 1, 4)
    mask = torch.tensor([[[True, True, True, False]]])
    score = torch.tensor([[[2.0, 1.0, 1.0, 9.0]]]) * torch.tensor(2.0).log()
    score.requires_grad_()
    loss = indexer.loss(score, share, mask, torch.tensor([[True]]))
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(loss, score)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
