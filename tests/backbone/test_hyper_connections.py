"""mHC's functions against plain autograd in float64, gradcheck, and stock's module."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import again
from posttrain.backbone.hyper_connections import Head, V4HyperConnection, V4HyperHead, connect

SHAPES = [(5, 4, 6), (1, 4, 8), (33, 3, 7), (130, 2, 5)]
SETTINGS = (1e-6, 1e-6, 20)
"""The norm's epsilon, the gates' and Sinkhorn's, and its iterations."""


def draw(shape: tuple[int, int, int], seed: int = 0) -> dict[str, Tensor]:
    tokens, streams, size = shape
    num = streams * (streams + 2)
    shapes = {
        "x": (tokens, streams, size),
        "y": (tokens, size),
        "fn": (num, streams * size),
        "base": (num,),
        "gain": (num,),
    }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for name, s in shapes.items()
    }


def plain_sinkhorn(comb_NNT: Tensor, eps: float, iterations: int) -> Tensor:
    for axis in (0, *(1, 0) * (iterations - 1)):
        comb_NNT = comb_NNT / (comb_NNT.sum(axis, keepdim=True) + eps)
    return comb_NNT


def plain_gates(
    x_TNH: Tensor, fn: Tensor, base: Tensor, gain: Tensor, *, norm_eps: float
) -> Tensor:
    flat = x_TNH.flatten(1)
    normed = flat * torch.rsqrt(flat.square().mean(1, keepdim=True) + norm_eps)
    return (normed @ fn.T * gain + base).T


def plain_connect(
    x_TNH: Tensor, fn: Tensor, base: Tensor, gain: Tensor, y_TH: Tensor
) -> tuple[Tensor, Tensor]:
    """What a block reads, and the streams after it returned y."""
    num, (norm_eps, eps, sweeps) = x_TNH.shape[1], SETTINGS
    pre, post, comb = plain_gates(x_TNH, fn, base, gain, norm_eps=norm_eps).split(
        [num, num, num * num]
    )
    comb = plain_sinkhorn(comb.unflatten(0, (num, num)).softmax(1) + eps, eps, sweeps)
    collapsed = torch.einsum("nt,tnh->th", pre.sigmoid() + eps, x_TNH)
    kept = torch.einsum("jkt,tjh->tkh", comb, x_TNH)
    return collapsed, kept + torch.einsum("kt,th->tkh", 2 * post.sigmoid(), y_TH)


def run_connect(
    x_TNH: Tensor, fn: Tensor, base: Tensor, gain: Tensor, y_TH: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    given: Any = settings or SETTINGS
    collapsed, write = connect(x_TNH, fn, base, gain, *given)
    return collapsed, write(y_TH)


def assert_same_with_gradients(found: Any, wanted: Any, inputs: list[Tensor]) -> None:
    """Equal outputs, and equal gradients of a random weighting of them."""
    found, wanted = ((x,) if isinstance(x, Tensor) else x for x in (found, wanted))
    generator = torch.Generator().manual_seed(1)
    sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
        weight = torch.randn(b.shape, generator=generator, dtype=torch.float64)
        sums = [sums[0] + (a * weight).sum(), sums[1] + (b * weight).sum()]
    gradients = [torch.autograd.grad(s, inputs) for s in sums]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept", [0, 99])
def test_connect_equals_plain_autograd_whatever_the_streams_layout(
    shape: tuple[int, int, int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "KEPT", kept)
    p = draw(shape)
    inputs = [p["x"], p["fn"], p["base"], p["gain"], p["y"]]
    assert_same_with_gradients(run_connect(*inputs), plain_connect(*inputs), inputs)
    by_stream = p["x"].transpose(0, 1).contiguous().transpose(0, 1)
    pairs = zip(run_connect(by_stream, *inputs[1:]), run_connect(*inputs), strict=True)
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_that_share_their_memory_are_taken(shape: tuple[int, int, int]) -> None:
    p = draw(shape)
    one = p["x"][:, 0].detach().requires_grad_()
    inputs = [one, p["fn"], p["base"], p["gain"], p["y"]]
    same = one.unsqueeze(1).expand(-1, shape[1], -1)
    found, wanted = (f(same, *inputs[1:]) for f in (run_connect, plain_connect))
    assert_same_with_gradients(found, wanted, inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_equals_plain_autograd(shape: tuple[int, int, int]) -> None:
    p, num = draw(shape), shape[1]
    inputs = [p["x"], p["fn"][:num], p["base"][:num], p["gain"][:1]]
    pre = plain_gates(p["x"], *inputs[1:], norm_eps=1e-6).sigmoid() + 1e-3
    wanted = torch.einsum("nt,tnh->th", pre, p["x"])
    assert_same_with_gradients(Head.apply(*inputs, 1e-6, 1e-3), wanted, inputs)


def test_gradcheck_in_float64() -> None:
    p = draw((3, 2, 3))
    check: Any = torch.autograd.gradcheck
    inputs = (p["x"], p["fn"], p["base"], p["gain"], p["y"])
    assert check(lambda *x: run_connect(*x, 1e-6, 1e-3, 4), inputs)
    assert check(
        lambda *x: Head.apply(*x, 1e-6, 1e-3), (p["x"], p["fn"][:2], p["base"][:2], p["gain"][:1])
    )


def make(kind: Any, seed: int = 0) -> Any:
    """Stock's module with random parameters, stock's own being zero or one in part."""
    module = kind(DeepseekV4Config(hidden_size=16))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def test_modules_equal_stocks() -> None:
    x = torch.randn(9, 4, 16, generator=torch.Generator().manual_seed(2))
    theirs, ours = make(stock.DeepseekV4HyperConnection), make(V4HyperConnection)
    post, comb, collapsed = theirs(x[None])
    found, write = ours(x)
    torch.testing.assert_close(found, collapsed[0], atol=1e-5, rtol=0)
    y = torch.randn(9, 16, generator=torch.Generator().manual_seed(4))
    wanted = torch.einsum("tjk,tjh->tkh", comb[0], x) + post[0].unsqueeze(-1) * y.unsqueeze(1)
    torch.testing.assert_close(write(y), wanted, atol=1e-5, rtol=0)
    head, our_head = make(stock.DeepseekV4HyperHead), make(V4HyperHead)
    torch.testing.assert_close(our_head(x), head(x[None])[0], atol=1e-5, rtol=0)
    assert torch.equal(our_head(x), our_head(x[None])[0])


def test_coefficients_are_float32_under_autocast_and_for_bf16() -> None:
    x = torch.randn(9, 4, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    module = make(V4HyperConnection)
    wanted = module(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], wanted[0].bfloat16())
    y = torch.zeros(9, 16)
    torch.testing.assert_close(found[1](y), wanted[1](y).bfloat16(), atol=0.05, rtol=0.02)


def test_no_tokens_give_zero_gradients() -> None:
    module = make(V4HyperConnection)
    x = torch.zeros(0, 4, 16, requires_grad=True)
    collapsed, write = module(x)
    (write(collapsed).sum() + make(V4HyperHead)(x).sum()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())
