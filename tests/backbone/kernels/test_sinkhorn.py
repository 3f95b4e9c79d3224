"""The fused Sinkhorn sweeps equal the plain ones in float64, forward and backward."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone.kernels import sinkhorn as kernel

EPS = 1e-6


def draw(streams: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Matrices as mHC makes them (softmax + eps), and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(streams, streams, tokens, generator=generator)
    grad = torch.randn(streams, streams, tokens, generator=generator)
    return logits.softmax(1) + EPS, grad


@pytest.mark.parametrize(
    ("streams", "tokens", "iterations"), [(4, 1, 20), (4, 131, 20), (4, 5, 1), (3, 7, 6), (2, 9, 2)]
)
def test_forward_and_backward_equal_the_plain_sweeps(
    streams: int, tokens: int, iterations: int, device: torch.device
) -> None:
    comb, grad = (x.to(device) for x in draw(streams, tokens, seed=tokens))
    exact = comb.double().requires_grad_()
    right = kernel.reference(exact, iterations, EPS)
    (wanted,) = torch.autograd.grad(right, exact, grad.double())
    out = kernel.sinkhorn(comb, iterations, EPS)
    found = kernel.sinkhorn_backward(grad, comb, iterations, EPS)
    torch.testing.assert_close(out.double(), right, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-5)


def test_rows_and_columns_sum_to_one(device: torch.device) -> None:
    out = kernel.sinkhorn(draw(4, 10, seed=3)[0].to(device) + 0.3, 20, EPS)
    ones = torch.ones(4, 10, device=device)
    torch.testing.assert_close(out.sum(0), ones, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.sum(1), ones, atol=1e-5, rtol=0)


def test_a_layout_of_any_strides_is_taken(device: torch.device) -> None:
    comb, grad = (x.to(device) for x in draw(4, 6, seed=4))
    odd = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (comb, grad)]
    assert torch.equal(kernel.sinkhorn(odd[0], 3, EPS), kernel.sinkhorn(comb, 3, EPS))
    wanted = kernel.sinkhorn_backward(grad, comb, 3, EPS)
    assert torch.equal(kernel.sinkhorn_backward(odd[1], odd[0], 3, EPS), wanted)
