"""SwiGLU and RMSNorm in loops equal swiglu.py's and norm.py's functions in float64: results and
gradients."""

import pytest
import torch
from torch import Tensor

from posttrain.backbone.host.sinkhorn import BLOCK
from posttrain.backbone.norm import rms_norm
from posttrain.backbone.swiglu import shared, weighted, weighted_backward

SHAPES = [(0, 8), (1, 1), (5, 7), (BLOCK + 3, 33), (300, 64)]
"""Rows, channels."""
LIMIT = 1.5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    atol = 1e-6 * max(1.0, float(wanted.abs().max())) if wanted.numel() else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol)


def cut(*shape: int, seed: int) -> Tensor:
    """Some numbers beyond the limit, some at it."""
    x = 2 * draw(*shape, seed=seed)
    x[:, ::3] = LIMIT
    x[:, 1::5] = -LIMIT
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_swiglu_and_its_gradients_are_float64s(shape: tuple[int, int]) -> None:
    rows, size = shape
    inputs = draw(rows, size), cut(rows, 2 * size, seed=1), draw(rows, seed=2)
    grad, gate_up, weight = (x.double() for x in inputs)
    assert_close(weighted(*inputs[1:], LIMIT), weighted(gate_up, weight, LIMIT))
    found = weighted_backward(*inputs, LIMIT)
    wanted = weighted_backward(grad, gate_up, weight, LIMIT)
    for a, b in zip((*found[:2], found[2]()), (*wanted[:2], wanted[2]()), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shared_experts_swiglu_is_float64s(shape: tuple[int, int]) -> None:
    gate, up, grad = cut(*shape, seed=1), cut(*shape, seed=2), draw(*shape)

    def run(dtype: torch.dtype) -> list[Tensor]:
        own_gate, own_up = (x.to(dtype).clone().requires_grad_() for x in (gate, up))
        out = shared(own_gate, own_up, LIMIT)
        return [out.detach(), *torch.autograd.grad(out, (own_gate, own_up), grad.to(dtype))]

    found = run(torch.float32)
    for a, b in zip(found, run(torch.float64), strict=True):
        assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(shared(gate, up, LIMIT), found[0])


def test_a_nan_stays_one() -> None:
    gate_up, weight = draw(2, 16), draw(2)
    for at in (3, 12):
        broken = gate_up.clone()
        broken[0, at] = float("nan")
        found = weighted(broken, weight, LIMIT)
        assert found[0, at % 8].isnan()
        assert found.isnan().sum() == 1
    broken = draw(3, 8)
    broken[1, 2] = float("nan")
    assert rms_norm(broken, draw(8), 1e-6).isnan().all(dim=1).tolist() == [False, True, False]


def run_norm(x: Tensor, weight: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x, weight = (a.to(dtype).clone().requires_grad_() for a in (x, weight))
    out = rms_norm(x, weight, 1e-3)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(dtype))]


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 2, 16), (2, 0, 8)])
def test_rms_norm_is_float64s(shape: tuple[int, ...]) -> None:
    given = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2)
    found, wanted = run_norm(*given, torch.float32), run_norm(*given, torch.float64)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(rms_norm(*given[:2], 1e-3), found[0])


def test_a_norm_of_turned_rows_is_that_of_their_copy() -> None:
    x, weight, grad = draw(9, 8, 16), draw(16, seed=1), draw(8, 9, 16, seed=2)
    turned = run_norm(x.transpose(0, 1), weight, grad, torch.float32)
    copied = run_norm(x.transpose(0, 1).contiguous(), weight, grad, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(turned, copied, strict=True))


@pytest.mark.parametrize("part", [1, 2])
def test_parts_in_threads_of_their_own_give_the_same_bits(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 4 * BLOCK - 5
    given = draw(rows, 16), draw(16, seed=1), draw(rows, 16, seed=2)
    gated = draw(rows, 8), draw(rows, 16, seed=3), draw(rows, seed=4), LIMIT

    def run() -> list[Tensor]:
        hidden, grad_weight, through = weighted_backward(*gated)
        norm = run_norm(*given, torch.float32)
        return [*norm, weighted(*gated[1:]), hidden, grad_weight, through()]

    def parts(blocks: int, _: int) -> list[int]:
        assert blocks == 4
        return [*range(part, blocks, part), blocks]

    wanted = run()
    monkeypatch.setattr("posttrain.backbone.host.parts.even", parts)
    assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))
