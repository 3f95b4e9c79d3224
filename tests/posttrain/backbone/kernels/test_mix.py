"""Collapsing and mixing the streams equal two einsums in float64, forward and backward."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone import hyper_connections
from posttrain.backbone.kernels import mix as kernel

SHAPES = [(3, 4, 8), (2, 4, 700), (5, 3, 33), (1, 2, 1)]  # T, N, H; 700: two blocks


def draw(shape: tuple[int, int, int], device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    tokens, streams, hidden = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (tokens, streams, hidden),
        "y": (tokens, hidden),
        "pre": (streams, tokens),
        "post": (streams, tokens),
        "comb": (streams, streams, tokens),
    }
    return {k: torch.randn(s, generator=generator).to(device) for k, s in sizes.items()}


def compare(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tolerance: float,
) -> None:
    """Values and gradients of all inputs."""
    found = [x.clone().requires_grad_() for x in inputs]
    wanted = [x.double().requires_grad_() for x in inputs]
    out, right = function(*found), reference(*wanted)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(grad)
    right.backward(grad.double())
    for a, b in [(out, right), *((x.grad, w.grad) for x, w in zip(found, wanted, strict=True))]:
        assert a is not None
        assert b is not None
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_collapse_equals_an_einsum(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    p = draw(shape, device)
    inputs = (p["pre"], p["x"].to(dtype))
    compare(kernel.collapse, kernel.collapse_reference, inputs, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_mix_equals_two_einsums(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    p = draw(shape, device)
    inputs = (p["x"].to(dtype), p["y"].to(dtype), p["post"], p["comb"])
    compare(kernel.mix, kernel.mix_reference, inputs, tolerance)


def test_they_take_the_place_of_the_torch_functions(device: torch.device) -> None:
    p = draw((3, 4, 16), device, seed=5)
    mixed = hyper_connections.mix(p["x"], p["y"], p["post"], p["comb"])
    found = kernel.mix(p["x"], p["y"], p["post"], p["comb"])
    torch.testing.assert_close(found, mixed, atol=1e-5, rtol=0)
    collapsed = hyper_connections.Collapse.apply(p["pre"], p["x"])
    torch.testing.assert_close(kernel.collapse(p["pre"], p["x"]), collapsed, atol=1e-5, rtol=0)
