"""Hyper-connections at one token a row: those of training, laid out by token."""

from typing import Any

import pytest
import torch
from small_v4 import small_model
from torch import Tensor

from posttrain.backbone import decode_hyper

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def make(dtype: torch.dtype, num_tokens: int, seed: int, **changes: Any) -> tuple[Any, Tensor]:
    """A model and streams (T, N, H)."""
    model: Any = small_model(seed=seed, **changes)
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    x_TNH = torch.randn(num_tokens, model.config.hc_mult, 32, generator=generator)
    return model.model, 3 * x_TNH.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "iterations"), [(1, 20), (13, 1), (64, 3)])
@torch.no_grad()
def test_a_connection_is_the_trained_one(
    dtype: torch.dtype, num_tokens: int, iterations: int
) -> None:
    model, x_TNH = make(dtype, num_tokens, seed=num_tokens, hc_sinkhorn_iters=iterations)
    connection = model.layers[1].ffn_hc
    connection.hc_eps = 0.01  # large enough to be missed
    collapsed_TH, trained_write = connection(x_TNH)
    collapsed, write = decode_hyper.connect(connection, x_TNH)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    tolerance = 2e-2 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(collapsed, collapsed_TH, atol=tolerance, rtol=tolerance)
    y_TH = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted, found = trained_write(y_TH), write(y_TH)
    assert found.dtype == dtype
    tolerance *= 3  # in bf16 the sums round after each term
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_last_streams_collapse_as_in_training(dtype: torch.dtype) -> None:
    model, x_TNH = make(dtype, 9, seed=4)
    model.hc_head.eps = 0.01
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    found = decode_hyper.collapse(model.hc_head, x_TNH)
    torch.testing.assert_close(
        found, model.hc_head(x_TNH.unsqueeze(0))[0], atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sweeps_by_hand(iterations: int) -> None:
    generator = torch.Generator().manual_seed(iterations)
    soft_NNT = torch.rand(3, 3, 5, generator=generator, dtype=torch.float64)
    comb = soft_NNT.permute(2, 0, 1) + 0.25
    for sweep in range(2 * iterations - 1):
        comb = comb / (comb.sum(1 + sweep % 2, keepdim=True) + 0.25)
    found = decode_hyper.sinkhorn(soft_NNT, iterations, 0.25)
    torch.testing.assert_close(found, comb, atol=1e-14, rtol=1e-13)


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Not even one that is not a number."""
    model, x_TNH = make(torch.float32, 16, seed=5)
    x_TNH[3] = float("nan")
    is_well = torch.arange(16) != 3
    with torch.no_grad():
        together, write = decode_hyper.connect(model.layers[0].attn_hc, x_TNH)
        apart, write_apart = decode_hyper.connect(model.layers[0].attn_hc, x_TNH[is_well])
        after, after_apart = write(together), write_apart(apart)
    torch.testing.assert_close(together[is_well], apart, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[is_well], after_apart, atol=1e-5, rtol=1e-5)
