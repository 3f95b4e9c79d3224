"""Sinkhorn sweeps of mHC's mixing matrices (V4 report 2.2): columns, then (rows, columns).

Each sweep divides the rows or columns of a token's N x N matrix by their sum + eps. Forward and
backward are one kernel each: a thread keeps its token's matrix in registers through all sweeps.
Backward sweeps again, keeping the sums alone, N numbers a sweep and token: the matrix before a
sweep is the one after times its sums.

Run so far: triton 3.6's interpreter on CPU. Compiled for sm_80 and sm_90, without spills; run on
no GPU yet.

Legend: T tokens, N streams, axes (from stream, to stream, token) as in hyper_connections.py.
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
from torch import Tensor

from posttrain.backbone.kernels.launch import ceil_div, jit, power_of_two

BLOCK_T = 128
"""Tokens a program, one a thread."""


def reference(comb_NNT: Tensor, iterations: int, eps: float) -> Tensor:
    """The same in plain torch, of any float dtype."""
    for axis in (0, *(1, 0) * (iterations - 1)):
        comb_NNT = comb_NNT / (comb_NNT.sum(axis, keepdim=True) + eps)
    return comb_NNT


def sinkhorn(comb_NNT: Tensor, iterations: int, eps: float) -> Tensor:
    """(N, N, T) float32 -> (N, N, T); eps > 0, iterations >= 1."""
    comb_NNT = comb_NNT.contiguous()
    out_NNT = torch.empty_like(comb_NNT)
    with torch.cuda.device_of(comb_NNT):
        _forward[_grid(comb_NNT)](comb_NNT, out_NNT, iterations, eps, **_sizes(comb_NNT))
    return out_NNT


def sinkhorn_backward(grad_NNT: Tensor, comb_NNT: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient at `sinkhorn`'s input, `comb`, from that at its result."""
    comb_NNT = comb_NNT.contiguous()
    streams, _, tokens = comb_NNT.shape
    totals = comb_NNT.new_empty(2 * iterations - 1, streams, tokens)
    grad_in_NNT = torch.empty_like(comb_NNT)
    inputs = (comb_NNT, grad_NNT.contiguous(), totals, grad_in_NNT, iterations, eps)
    with torch.cuda.device_of(comb_NNT):
        _backward[_grid(comb_NNT)](*inputs, **_sizes(comb_NNT))
    return grad_in_NNT


def _grid(comb_NNT: Tensor) -> tuple[int]:
    return (ceil_div(comb_NNT.shape[-1], BLOCK_T),)


def _sizes(comb_NNT: Tensor) -> dict[str, int]:
    streams, _, tokens = comb_NNT.shape
    block_n = power_of_two(streams)
    return {"T": tokens, "N": streams, "BLOCK_N": block_n, "BLOCK_T": BLOCK_T, "num_warps": 4}


@jit
def _tokens(BLOCK_T: tl.constexpr):
    """Said not to be aligned, so that no thread loads several tokens at once: then each keeps
    one token's matrix whole, and a sweep moves nothing between threads."""
    return tl.multiple_of(tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), 1)


@jit
def _tile(T, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Where this program's matrices (BLOCK_N, BLOCK_N, BLOCK_T) stand, and which are real."""
    row = tl.arange(0, BLOCK_N)[:, None, None]
    column = tl.arange(0, BLOCK_N)[None, :, None]
    token = _tokens(BLOCK_T)[None, None, :]
    return (row * N + column) * T + token, (row < N) & (column < N) & (token < T)


@jit
def _totals_tile(T, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """The same for sums (BLOCK_N, BLOCK_T)."""
    line = tl.arange(0, BLOCK_N)[:, None]
    token = _tokens(BLOCK_T)[None, :]
    return line * T + token, (line < N) & (token < T)


@jit
def _forward(
    comb, out, iterations, eps, T, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    place, real = _tile(T, N, BLOCK_N, BLOCK_T)
    x = tl.load(comb + place, mask=real, other=0.0)
    x = x / (tl.sum(x, 0) + eps)[None, :, :]
    for _ in range(1, iterations):
        x = x / (tl.sum(x, 1) + eps)[:, None, :]
        x = x / (tl.sum(x, 0) + eps)[None, :, :]
    tl.store(out + place, x, mask=real)


@jit
def _backward(
    comb,
    grad_out,
    totals,
    grad_in,
    iterations,
    eps,
    T,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """y = x / s, s = sum x + eps along the sweep's axis: grad_x = (grad_y - sum grad_y y) / s."""
    place, real = _tile(T, N, BLOCK_N, BLOCK_T)
    line, counts = _totals_tile(T, N, BLOCK_N, BLOCK_T)
    x = tl.load(comb + place, mask=real, other=0.0)
    total = tl.sum(x, 0) + eps
    tl.store(totals + line, total, mask=counts)
    x = x / total[None, :, :]
    for i in range(1, iterations):
        total = tl.sum(x, 1) + eps
        tl.store(totals + (2 * i - 1) * N * T + line, total, mask=counts)
        x = x / total[:, None, :]
        total = tl.sum(x, 0) + eps
        tl.store(totals + 2 * i * N * T + line, total, mask=counts)
        x = x / total[None, :, :]
    tl.debug_barrier()  # a sum is read back by whichever thread wants it
    grad = tl.load(grad_out + place, mask=real, other=0.0)
    for step in range(1, iterations):
        i = iterations - step
        total = tl.load(totals + 2 * i * N * T + line, mask=counts, other=1.0)
        grad = (grad - tl.sum(grad * x, 0)[None, :, :]) / total[None, :, :]
        x = x * total[None, :, :]
        total = tl.load(totals + (2 * i - 1) * N * T + line, mask=counts, other=1.0)
        grad = (grad - tl.sum(grad * x, 1)[:, None, :]) / total[:, None, :]
        x = x * total[:, None, :]
    total = tl.load(totals + line, mask=counts, other=1.0)
    grad = (grad - tl.sum(grad * x, 0)[None, :, :]) / total[None, :, :]
    tl.store(grad_in + place, grad, mask=real)
