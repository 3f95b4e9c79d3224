"""mHC by kernels equals hyper_connections' functions in float64: results and all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone import hyper_connections
from posttrain.backbone.kernels import hyper as kernel

SHAPES = [(5, 4, 6), (1, 4, 700), (17, 3, 7), (2, 2, 33)]  # T, N, H; 700: two blocks
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)]
SETTINGS = (1e-6, 1e-6, 20)
"""The norm's epsilon, the gates' and Sinkhorn's, and its iterations."""


def draw(shape: tuple[int, int, int], device: torch.device, num_gates: int) -> list[Tensor]:
    """Streams x, and fn, base and gain of so many coefficients, whose logits are some units."""
    tokens, streams, hidden = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(tokens, streams, hidden), (num_gates, streams * hidden), (num_gates,), (num_gates,)]
    parts = [torch.randn(s, generator=generator) for s in sizes]
    parts[1] *= (streams * hidden) ** -0.5
    return [x.to(device) for x in parts]


def written(module: Any) -> Any:
    """A module's `connect`: what a block reads, and the streams after it gave that back."""

    def through(*inputs: Any) -> list[Tensor]:
        collapsed, write = module.connect(*inputs)
        return [collapsed, write(collapsed)]

    return through


def run(function: Any, inputs: list[Tensor], *settings: float) -> list[Tensor]:
    """Results, and the gradients of a fixed weighting of them at all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = function(*leaves, *settings)
    outs = [outs] if isinstance(outs, Tensor) else outs
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


def compare(
    found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """`found` in the dtypes of a model whose streams are of `dtype`; errors over the largest."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            assert float((a.double() - b).abs().max() / b.abs().max()) < tolerance, i
    assert {a.dtype for a in found} <= {dtype, torch.float32}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_connect_equals_the_torch_function_in_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    x, *coefficients = draw(shape, device, shape[1] * (shape[1] + 2))
    inputs = [x.to(dtype), *coefficients]
    exact = [a.double() for a in inputs]
    wanted = run(written(hyper_connections), exact, *SETTINGS)
    found = run(written(kernel), inputs, *SETTINGS)
    compare(found, wanted, dtype, tolerance)
    assert [a.dtype for a in found[:3]] == [dtype] * 3  # collapsed, streams, and x's gradient
    assert {a.dtype for a in found[3:]} == {torch.float32}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_head_equals_the_torch_function_in_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    x, fn, base, gain = draw(shape, device, shape[1])
    inputs = [x.to(dtype), fn, base, gain[:1]]
    wanted = run(hyper_connections.Head.apply, [a.double() for a in inputs], 1e-6, 1e-3)
    compare(run(kernel.Head.apply, inputs, 1e-6, 1e-3), wanted, dtype, tolerance)


def test_no_tokens_give_zero_gradients(device: torch.device) -> None:
    for num_gates, num_gains, functions, settings in (
        (24, 24, (written(kernel), written(hyper_connections)), SETTINGS),
        (4, 1, (kernel.Head.apply, hyper_connections.Head.apply), SETTINGS[:2]),
    ):
        x, fn, base, gain = draw((0, 4, 16), device, num_gates)
        inputs = [x, fn, base, gain[:num_gains]]
        found, wanted = (run(function, inputs, *settings) for function in functions)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


def test_streams_of_any_layout_are_taken(device: torch.device) -> None:
    x, *coefficients = draw((4, 3, 8), device, 15)
    wanted = run(written(kernel), [x, *coefficients], *SETTINGS)
    by_stream = x.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        run(written(kernel), [by_stream, *coefficients], *SETTINGS), wanted, strict=True
    ):
        assert torch.equal(a, b)
    same = x[:, :1].expand(-1, 3, -1)  # as the first layer gets them
    wanted = run(written(kernel), [same.contiguous(), *coefficients], *SETTINGS)
    for a, b in zip(run(written(kernel), [same, *coefficients], *SETTINGS), wanted, strict=True):
        assert torch.equal(a, b)
