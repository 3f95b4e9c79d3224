"""Collapsing and mixing the streams equal two einsums in float64, forward and backward."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

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


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The largest difference, over the largest wanted."""
    found, wanted = found.detach().double(), wanted.detach()
    assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance


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
        assert_near(a, b, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_collapse_and_its_gradients_parts_equal_einsums(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    p = draw(shape, device)
    pre, x, y = p["pre"], p["x"].to(dtype), p["y"].to(dtype)
    exact = [a.double() for a in (pre, x, y)]
    collapsed = kernel.collapse(pre, x)
    assert collapsed.dtype == dtype
    assert_near(collapsed, torch.einsum("nt,tnh->th", *exact[:2]), tolerance)
    dots = kernel.dots(x, y)
    assert dots.dtype == torch.float32
    assert_near(dots, torch.einsum("tnh,th->nt", *exact[1:]), 1e-5)
    through, own = draw(shape, device, seed=1)["x"], p["post"][0]
    passed = draw(shape, device, seed=2)["x"].to(dtype)
    wanted = through.double() + own.double()[:, None, None] * exact[1]
    wanted += torch.einsum("nt,th->tnh", exact[0], exact[2])
    added = kernel.add_streams(through.clone(), x, y, own, pre)
    assert added.dtype == dtype
    assert_near(added, wanted, tolerance)
    added = kernel.add_streams(through, x, y, own, pre, passed)
    assert_near(added, wanted + passed.double(), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_mix_equals_two_einsums(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    p = draw(shape, device)
    inputs = (p["x"].to(dtype), p["y"].to(dtype), p["post"], p["comb"])
    compare(kernel.mix, kernel.mix_reference, inputs, tolerance)
