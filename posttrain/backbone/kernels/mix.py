"""mHC's two passes over the streams (V4 report 2.2), each read once and written once.

collapsed = sum_n pre[n] x[n]; new[k] = post[k] y + sum_j comb[j, k] x[j] (comb acts transposed).
Backward sums the coefficients' gradients over H in one program, so their order is fixed.
`collapse`, `dots` and `add_streams` are what hyper.py's function is made of, without gradients of
their own.

Run so far: triton 3.6's interpreter on CPU. Compiled for sm_80 and sm_90, without spills; run on
no GPU yet.

Legend: T tokens, N streams, H hidden size; comb axes (from stream j, to stream k, token).
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
from torch import Tensor

from posttrain.backbone.function import plain_backward
from posttrain.backbone.kernels.launch import jit, power_of_two


def mix_reference(x_TNH: Tensor, y_TH: Tensor, post_NT: Tensor, comb_NNT: Tensor) -> Tensor:
    mixed_TNH = torch.einsum("jkt,tjh->tkh", comb_NNT, x_TNH)
    return torch.einsum("nt,th->tnh", post_NT, y_TH) + mixed_TNH


def collapse(pre_NT: Tensor, x_TNH: Tensor) -> Tensor:
    """(T, H) in x's dtype from pre (N, T) float32 and streams x (T, N, H)."""
    pre_NT, x_TNH = pre_NT.contiguous(), x_TNH.contiguous()
    out_TH = x_TNH.new_empty(len(x_TNH), x_TNH.shape[2])
    with torch.cuda.device_of(x_TNH):
        _collapse[(len(x_TNH),)](pre_NT, x_TNH, out_TH, **_sizes(x_TNH))
    return out_TH


def dots(x_TNH: Tensor, y_TH: Tensor) -> Tensor:
    """x[n] . y of each token, (N, T) float32: the gradient at `collapse`'s pre, y being that at
    its result."""
    x_TNH, y_TH = x_TNH.contiguous(), y_TH.contiguous()
    out_NT = torch.empty(x_TNH.shape[1::-1], dtype=torch.float32, device=x_TNH.device)
    with torch.cuda.device_of(x_TNH):
        _dots[(len(x_TNH),)](x_TNH, y_TH, out_NT, **_sizes(x_TNH))
    return out_NT


def add_streams(
    through_TNH: Tensor,
    x_TNH: Tensor,
    y_TH: Tensor,
    own_T: Tensor,
    pre_NT: Tensor,
    passed_TNH: Tensor | None = None,
) -> Tensor:
    """through[n] + own x[n] + pre[n] y + passed[n], (T, N, H) in x's dtype, rounded once: the
    streams' gradient in its parts (hyper.py). `through` and the coefficients are float32;
    `through` is spent."""
    tensors = (through_TNH, x_TNH, y_TH, own_T, pre_NT, x_TNH if passed_TNH is None else passed_TNH)
    inputs = [a.contiguous() for a in tensors]
    out_TNH = inputs[0] if x_TNH.dtype == torch.float32 else torch.empty_like(inputs[1])
    has_passed = passed_TNH is not None
    with torch.cuda.device_of(x_TNH):
        _add_streams[(len(x_TNH),)](*inputs, out_TNH, HAS_PASSED=has_passed, **_sizes(x_TNH))
    return out_TNH


def mix(x_TNH: Tensor, y_TH: Tensor, post_NT: Tensor, comb_NNT: Tensor) -> Tensor:
    """(T, N, H) in x's dtype from streams x, a block's output y (T, H), post (N, T) and comb
    (N, N, T), whose sums are float32: what hyper_connections' Connect keeps, and Write, in one."""
    return Mix.apply(x_TNH, y_TH.to(x_TNH.dtype), post_NT.float(), comb_NNT.float())  # pyright: ignore[reportReturnType]  # apply has no types


class Mix(torch.autograd.Function):
    """`mix` for autograd."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, y_TH: Tensor, post_NT: Tensor, comb_NNT: Tensor) -> Tensor:
        inputs = tuple(x.contiguous() for x in (x_TNH, y_TH, post_NT, comb_NNT))
        out_TNH = torch.empty_like(inputs[0])
        with torch.cuda.device_of(x_TNH):
            _mix[(len(x_TNH),)](*inputs, out_TNH, **_sizes(x_TNH))
        ctx.save_for_backward(*inputs)
        return out_TNH

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # plain_backward's type
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        outputs = tuple(torch.empty_like(x) for x in inputs)
        with torch.cuda.device_of(inputs[0]):
            _mix_backward[(len(inputs[0]),)](
                *inputs, grads[0].contiguous(), *outputs, **_sizes(inputs[0])
            )
        return outputs


def _sizes(x_TNH: Tensor) -> dict[str, int]:
    tokens, streams, hidden = x_TNH.shape
    return {
        "T": tokens,
        "H": hidden,
        "N": streams,
        "BLOCK_N": power_of_two(streams),
        "BLOCK_H": power_of_two(hidden, most=512),
        "num_warps": 4,
    }


@jit
def _vector(x, T, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """One token's column of x (N, T) as (BLOCK_N,): where it stands, which of it is real."""
    n = tl.arange(0, BLOCK_N)
    return x + n * T + tl.program_id(0), n < N


@jit
def _matrix(x, T, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """One token's matrix of x (N, N, T) as (BLOCK_N, BLOCK_N)."""
    j = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_N)[None, :]
    return x + (j * N + k) * T + tl.program_id(0), (j < N) & (k < N)


@jit
def _streams(x, h, H, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns h of one token's streams x (T, N, H) as (BLOCK_N, BLOCK_H)."""
    n = tl.arange(0, BLOCK_N)[:, None]
    token = tl.program_id(0).to(tl.int64)
    return x + (token * N + n) * H + h[None, :], (n < N) & (h < H)[None, :]


@jit
def _collapse(pre, x, out, T, H, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """One token a program."""
    at_pre, real = _vector(pre, T, N, BLOCK_N)
    weight = tl.load(at_pre, mask=real, other=0.0)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        at_x, inside = _streams(x, h, H, N, BLOCK_N)
        stream = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(stream * weight[:, None], 0)
        at_out = out + tl.program_id(0).to(tl.int64) * H + h
        tl.store(at_out, total.to(out.dtype.element_ty), mask=h < H)


@jit
def _dots(x, y, out, T, H, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """One token a program."""
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        at_y = y + tl.program_id(0).to(tl.int64) * H + h
        row = tl.load(at_y, mask=h < H, other=0.0).to(tl.float32)
        at_x, inside = _streams(x, h, H, N, BLOCK_N)
        stream = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        acc += tl.sum(stream * row[None, :], 1)
    at_out, real = _vector(out, T, N, BLOCK_N)
    tl.store(at_out, acc, mask=real)


@jit
def _add_streams(
    through,
    x,
    y,
    own,
    pre,
    passed,
    out,
    T,
    H,
    HAS_PASSED: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token a program; `out` may be `through`: each place is read before it is written."""
    at_pre, real = _vector(pre, T, N, BLOCK_N)
    weight = tl.load(at_pre, mask=real, other=0.0)
    gain = tl.load(own + tl.program_id(0))
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        at_y = y + tl.program_id(0).to(tl.int64) * H + h
        row = tl.load(at_y, mask=h < H, other=0.0).to(tl.float32)
        at_through, inside = _streams(through, h, H, N, BLOCK_N)
        total = tl.load(at_through, mask=inside, other=0.0)
        at_x, inside = _streams(x, h, H, N, BLOCK_N)
        total += gain * tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        total += weight[:, None] * row[None, :]
        if HAS_PASSED:
            at_passed, inside = _streams(passed, h, H, N, BLOCK_N)
            total += tl.load(at_passed, mask=inside, other=0.0).to(tl.float32)
        at_out, inside = _streams(out, h, H, N, BLOCK_N)
        tl.store(at_out, total.to(out.dtype.element_ty), mask=inside)


@jit
def _mix(
    x, y, post, comb, out, T, H, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr
):
    """One token a program."""
    at_post, real = _vector(post, T, N, BLOCK_N)
    gain = tl.load(at_post, mask=real, other=0.0)
    at_comb, whole = _matrix(comb, T, N, BLOCK_N)
    matrix = tl.load(at_comb, mask=whole, other=0.0)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        at_y = y + tl.program_id(0).to(tl.int64) * H + h
        new = gain[:, None] * tl.load(at_y, mask=h < H, other=0.0).to(tl.float32)[None, :]
        at_x, inside = _streams(x, h, H, N, BLOCK_N)
        stream = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        new += tl.sum(matrix[:, :, None] * stream[:, None, :], 0)
        at_out, inside = _streams(out, h, H, N, BLOCK_N)
        tl.store(at_out, new.to(out.dtype.element_ty), mask=inside)


@jit
def _mix_backward(
    x,
    y,
    post,
    comb,
    grad_out,
    grad_x,
    grad_y,
    grad_post,
    grad_comb,
    T,
    H,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    at_post, real = _vector(post, T, N, BLOCK_N)
    gain = tl.load(at_post, mask=real, other=0.0)
    at_comb, whole = _matrix(comb, T, N, BLOCK_N)
    matrix = tl.load(at_comb, mask=whole, other=0.0)
    acc_post = tl.zeros((BLOCK_N,), tl.float32)
    acc_comb = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        at_grad, inside = _streams(grad_out, h, H, N, BLOCK_N)
        grad = tl.load(at_grad, mask=inside, other=0.0).to(tl.float32)
        at_token = tl.program_id(0).to(tl.int64) * H + h
        block = tl.load(y + at_token, mask=h < H, other=0.0).to(tl.float32)
        acc_post += tl.sum(grad * block[None, :], 1)
        slope = tl.sum(gain[:, None] * grad, 0)
        tl.store(grad_y + at_token, slope.to(grad_y.dtype.element_ty), mask=h < H)
        at_x, inside = _streams(x, h, H, N, BLOCK_N)
        stream = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
        acc_comb += tl.sum(stream[:, None, :] * grad[None, :, :], 2)
        back = tl.sum(matrix[:, :, None] * grad[None, :, :], 1)
        at_grad_x, inside = _streams(grad_x, h, H, N, BLOCK_N)
        tl.store(at_grad_x, back.to(grad_x.dtype.element_ty), mask=inside)
    at_grad_post, real = _vector(grad_post, T, N, BLOCK_N)
    tl.store(at_grad_post, acc_post, mask=real)
    at_grad_comb, whole = _matrix(grad_comb, T, N, BLOCK_N)
    tl.store(at_grad_comb, acc_comb, mask=whole)
