"""Attention of each query over its own list of keys, with a sink (V4 report 2.3; keys = values).

out[t, h] = sum_j p[t, h, j] pool[index[t, j]], p = softmax over [scale q[t, h] . pool[index[t, j]],
sink[h]]; the sink takes its share and gives nothing. `index` lists rows of one pool (window keys
and compressed entries of all documents), -1 where a query has fewer than K keys.

The pool's gradient sums over all queries that saw a key. It is added up without atomics, so the
same inputs give the same bits: a chunk of tokens at a time, each (token, key) pair's share is
written to a buffer, and each key's shares are then added one after the other in the order of its
pairs. The order is that of the tokens whatever the chunks, so their size changes no bit either.

Run so far: triton 3.6's interpreter on CPU. Compiled for sm_80 and sm_90, no atomics and, at V4's
sizes in bfloat16, no spills; run on no GPU yet, so block sizes are untuned. float32 goes without
tensor cores: it is for checks.

Legend: T tokens, h heads, d head size, P rows of the pool, K keys a query.
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
from torch import Tensor

from posttrain.backbone.function import plain_backward
from posttrain.backbone.kernels.launch import ceil_div, dot_type, jit, power_of_two

PAIR_BYTES = 256 * 2**20
"""Size of the buffer of the pairs' gradients: memory alone depends on it, no result does."""


def reference(
    q_Thd: Tensor, pool_Pd: Tensor, index_TK: Tensor, sink_h: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (T, h, d), logsumexp (T, h) and attention received (T, K), by one dense softmax."""
    keys_TKd = pool_Pd[index_TK.clamp(min=0).long()]
    score_ThK = torch.einsum("thd,tkd->thk", q_Thd, keys_TKd) * scale
    score_ThK = score_ThK.masked_fill(index_TK[:, None] < 0, float("-inf"))
    sink_Th1 = sink_h.expand(len(q_Thd), -1).unsqueeze(-1)
    logsumexp_Th = torch.cat([score_ThK, sink_Th1], dim=-1).logsumexp(-1)
    weight_ThK = (score_ThK - logsumexp_Th.unsqueeze(-1)).exp()
    return torch.einsum("thk,tkd->thd", weight_ThK, keys_TKd), logsumexp_Th, weight_ThK.sum(1)


def sparse_attention(
    q_Thd: Tensor, pool_Pd: Tensor, index_TK: Tensor, sink_h: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (T, h, d) in q's dtype and logsumexp (T, h) in float32, the sink's share included.

    q and pool: bfloat16, float16 or float32, of one dtype; index: int32, each -1 or a row of the
    pool (a row listed twice counts twice); sink: a logit per head. Sums are float32. Both results
    carry gradients to q, pool and sink.
    """
    return SparseAttention.apply(q_Thd, pool_Pd, index_TK, sink_h, scale)  # pyright: ignore[reportReturnType]  # apply has no types


@torch.no_grad()
def attention_received(
    q_Thd: Tensor, pool_Pd: Tensor, index_TK: Tensor, logsumexp_Th: Tensor, *, scale: float
) -> Tensor:
    """sum_h p[t, h, j], (T, K) float32, no gradient: the target of the indexer's loss.

    `logsumexp_Th` is that of the whole softmax; `index_TK` may list only some of its keys, such as
    the compressed entries without the window.
    """
    q_Thd, pool_Pd, index_TK = (x.contiguous() for x in (q_Thd, pool_Pd, index_TK))
    received_TK = torch.empty(index_TK.shape, dtype=torch.float32, device=q_Thd.device)
    sizes = _sizes(q_Thd, index_TK)
    grid = (len(q_Thd), ceil_div(index_TK.shape[1], sizes["BLOCK_K"]))
    with torch.cuda.device_of(q_Thd):
        _receive[grid](
            q_Thd, pool_Pd, index_TK, logsumexp_Th.contiguous(), received_TK, scale, **sizes
        )
    return received_TK


class SparseAttention(torch.autograd.Function):
    """`sparse_attention` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, q_Thd: Tensor, pool_Pd: Tensor, index_TK: Tensor, sink_h: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_Thd, pool_Pd, index_TK, sink_h = (
            x.contiguous() for x in (q_Thd, pool_Pd, index_TK, sink_h)
        )
        out_Thd = torch.empty_like(q_Thd)
        logsumexp_Th = torch.empty(q_Thd.shape[:2], dtype=torch.float32, device=q_Thd.device)
        sizes = _sizes(q_Thd, index_TK)
        grid = (len(q_Thd), ceil_div(q_Thd.shape[1], sizes["BLOCK_H"]))
        with torch.cuda.device_of(q_Thd):
            _forward[grid](q_Thd, pool_Pd, index_TK, sink_h, out_Thd, logsumexp_Th, scale, **sizes)
        ctx.save_for_backward(q_Thd, pool_Pd, index_TK, sink_h, out_Thd, logsumexp_Th)
        ctx.scale = scale
        return out_Thd, logsumexp_Th

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # plain_backward's type
        q_Thd, pool_Pd, index_TK, sink_h, out_Thd, logsumexp_Th = ctx.saved_tensors
        grad_Thd = grads[0].to(q_Thd.dtype).contiguous()
        # d loss / d score = p (grad . key - delta), for keys and sink alike
        delta_Th = (grad_Thd.float() * out_Thd.float()).sum(-1) - grads[1]
        sink_share_Th = (sink_h.float() - logsumexp_Th).exp()
        grad_sink_h = -(sink_share_Th * delta_Th).sum(0).to(sink_h.dtype)
        inputs = (q_Thd, pool_Pd, index_TK, logsumexp_Th, grad_Thd, delta_Th)
        with torch.cuda.device_of(q_Thd):
            grad_q_Thd = _grad_q(*inputs, ctx.scale) if ctx.needs_input_grad[0] else None
            grad_pool_Pd = _grad_pool(*inputs, ctx.scale) if ctx.needs_input_grad[1] else None
        return grad_q_Thd, grad_pool_Pd, None, grad_sink_h, None


def _sizes(q_Thd: Tensor, index_TK: Tensor) -> dict[str, Any]:
    """Sizes, blocks and launch options of every kernel below but `_add_pairs`."""
    _, heads, size = q_Thd.shape
    most = 16 if q_Thd.dtype == torch.float32 else 32  # three tiles of 512 in shared memory
    return {
        "H": heads,
        "K": index_TK.shape[1],
        "D": size,
        "BLOCK_H": power_of_two(heads, least=16, most=most),
        "BLOCK_K": power_of_two(index_TK.shape[1], least=16, most=most),
        "BLOCK_D": power_of_two(size, least=16),
        "DOT": dot_type(q_Thd),
        "num_warps": 8 if size > 128 else 4,
        "num_stages": 2,
    }


def _grad_q(
    q_Thd: Tensor,
    pool_Pd: Tensor,
    index_TK: Tensor,
    logsumexp_Th: Tensor,
    grad_Thd: Tensor,
    delta_Th: Tensor,
    scale: float,
) -> Tensor:
    grad_q_Thd = torch.empty_like(q_Thd)
    inputs = (q_Thd, pool_Pd, index_TK, logsumexp_Th, grad_Thd, delta_Th)
    sizes = _sizes(q_Thd, index_TK)
    grid = (len(q_Thd), ceil_div(q_Thd.shape[1], sizes["BLOCK_H"]))
    _backward_q[grid](*inputs, grad_q_Thd, scale, **sizes)
    return grad_q_Thd


def _grad_pool(
    q_Thd: Tensor,
    pool_Pd: Tensor,
    index_TK: Tensor,
    logsumexp_Th: Tensor,
    grad_Thd: Tensor,
    delta_Th: Tensor,
    scale: float,
) -> Tensor:
    (rows, size), keys = pool_Pd.shape, index_TK.shape[1]
    grad_pool_Pd = torch.zeros(rows, size, dtype=torch.float32, device=pool_Pd.device)
    chunk = max(1, PAIR_BYTES // max(1, 4 * keys * size))
    pair_grad = grad_pool_Pd.new_empty(min(chunk, len(q_Thd)) * keys, size)
    sizes = _sizes(q_Thd, index_TK)
    block = min(sizes["BLOCK_D"], 128)
    row_P1 = torch.arange(rows + 1, dtype=index_TK.dtype, device=pool_Pd.device)
    for first in range(0, len(q_Thd), chunk):
        here = slice(first, first + chunk)
        inputs = (logsumexp_Th[here], grad_Thd[here], delta_Th[here], pair_grad, scale)
        grid = (len(q_Thd[here]), ceil_div(keys, sizes["BLOCK_K"]))
        _backward_pairs[grid](q_Thd[here], pool_Pd, index_TK[here], *inputs, **sizes)
        row_N, pair_N = index_TK[here].flatten().sort(stable=True)
        start_P1 = torch.searchsorted(row_N, row_P1)
        _add_pairs[(rows, ceil_div(size, block))](
            pair_grad, pair_N, start_P1, grad_pool_Pd, D=size, BLOCK_D=block, num_warps=1
        )
    return grad_pool_Pd.to(pool_Pd.dtype)


@jit
def _heads(x, token, head, H, D, BLOCK_D: tl.constexpr):
    """Rows `head` of one token of x (T, H, D) as a tile; zeros past the end."""
    dim = tl.arange(0, BLOCK_D)
    place = (token * H + head)[:, None] * D + dim[None, :]
    return tl.load(x + place, mask=(head < H)[:, None] & (dim < D)[None, :], other=0.0)


@jit
def _keys(pool, row, D, BLOCK_D: tl.constexpr):
    """Rows of the pool as a tile (BLOCK_K, BLOCK_D); zeros where row is -1."""
    dim = tl.arange(0, BLOCK_D)
    place = row.to(tl.int64)[:, None] * D + dim[None, :]
    return tl.load(pool + place, mask=(row >= 0)[:, None] & (dim < D)[None, :], other=0.0)


@jit
def _rows(index, token, slot, K):
    """What a token's slots point at, -1 past the end."""
    return tl.load(index + token * K + slot, mask=slot < K, other=-1)


@jit
def _forward(
    q,
    pool,
    index,
    sink,
    out,
    logsumexp,
    scale,
    H,
    K,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One token and BLOCK_H heads a program: online softmax over blocks of keys."""
    token = tl.program_id(0).to(tl.int64)  # T h d passes 2^31 in long batches
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    queries = _heads(q, token, head, H, D, BLOCK_D).to(DOT)
    top = tl.load(sink + head, mask=head < H, other=0.0).to(tl.float32)
    total = tl.full((BLOCK_H,), 1.0, tl.float32)  # the sink's own exp(sink - top)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        row = _rows(index, token, first + tl.arange(0, BLOCK_K), K)
        keys = _keys(pool, row, D, BLOCK_D).to(DOT)
        score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where((row >= 0)[None, :], score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - highest[:, None])
        shrink = tl.exp(top - highest)
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(DOT), keys, acc * shrink[:, None], input_precision="ieee")
        top = highest
    dim = tl.arange(0, BLOCK_D)
    place = (token * H + head)[:, None] * D + dim[None, :]
    inside = (head < H)[:, None] & (dim < D)[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(logsumexp + token * H + head, top + tl.log(total), mask=head < H)


@jit
def _backward_q(
    q,
    pool,
    index,
    logsumexp,
    grad_out,
    delta,
    grad_q,
    scale,
    H,
    K,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One token and BLOCK_H heads a program: grad_q = scale sum_j slope[j] key[j]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    queries = _heads(q, token, head, H, D, BLOCK_D).to(DOT)
    grads = _heads(grad_out, token, head, H, D, BLOCK_D).to(DOT)
    total = tl.load(logsumexp + token * H + head, mask=head < H, other=0.0)
    shift = tl.load(delta + token * H + head, mask=head < H, other=0.0)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        row = _rows(index, token, first + tl.arange(0, BLOCK_K), K)
        keys = _keys(pool, row, D, BLOCK_D).to(DOT)
        score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        weight = tl.where((row >= 0)[None, :], tl.exp(score - total[:, None]), 0.0)
        through = tl.dot(grads, tl.trans(keys), input_precision="ieee")
        slope = weight * (through - shift[:, None])
        acc = tl.dot(slope.to(DOT), keys, acc, input_precision="ieee")
    dim = tl.arange(0, BLOCK_D)
    place = (token * H + head)[:, None] * D + dim[None, :]
    inside = (head < H)[:, None] & (dim < D)[None, :]
    tl.store(grad_q + place, (acc * scale).to(grad_q.dtype.element_ty), mask=inside)


@jit
def _backward_pairs(
    q,
    pool,
    index,
    logsumexp,
    grad_out,
    delta,
    pair_grad,
    scale,
    H,
    K,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One token and BLOCK_K of its keys a program: each pair's share of its key's gradient,
    sum_h p[h] grad_out[h] + scale slope[h] q[h]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = _rows(index, token, slot, K)
    keys = _keys(pool, row, D, BLOCK_D).to(DOT)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        queries = _heads(q, token, head, H, D, BLOCK_D).to(DOT)
        grads = _heads(grad_out, token, head, H, D, BLOCK_D).to(DOT)
        # a head past the end: exp(0 - inf) = 0
        total = tl.load(logsumexp + token * H + head, mask=head < H, other=float("inf"))
        shift = tl.load(delta + token * H + head, mask=head < H, other=0.0)
        score = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        weight = tl.exp(score - total[None, :])
        through = tl.dot(keys, tl.trans(grads), input_precision="ieee")
        slope = weight * (through - shift[None, :]) * scale
        acc = tl.dot(weight.to(DOT), grads, acc, input_precision="ieee")
        acc = tl.dot(slope.to(DOT), queries, acc, input_precision="ieee")
    dim = tl.arange(0, BLOCK_D)
    place = (token * K + slot)[:, None] * D + dim[None, :]
    tl.store(pair_grad + place, acc, mask=(row >= 0)[:, None] & (dim < D)[None, :])


@jit
def _add_pairs(pair_grad, pair, start, grad_pool, D, BLOCK_D: tl.constexpr):
    """One row of the pool and BLOCK_D dims a program: its pairs added in their order."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.load(grad_pool + row * D + dim, mask=dim < D, other=0.0)
    for n in range(tl.load(start + row), tl.load(start + row + 1)):
        place = tl.load(pair + n) * D + dim
        acc += tl.load(pair_grad + place, mask=dim < D, other=0.0)
    tl.store(grad_pool + row * D + dim, acc, mask=dim < D)


@jit
def _receive(
    q,
    pool,
    index,
    logsumexp,
    received,
    scale,
    H,
    K,
    D,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One token and BLOCK_K of its keys a program: p summed over the heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = _rows(index, token, slot, K)
    keys = _keys(pool, row, D, BLOCK_D).to(DOT)
    acc = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, H, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        queries = _heads(q, token, head, H, D, BLOCK_D).to(DOT)
        total = tl.load(logsumexp + token * H + head, mask=head < H, other=float("inf"))
        score = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale
        acc += tl.sum(tl.exp(score - total[None, :]), 1)
    tl.store(received + token * K + slot, tl.where(row >= 0, acc, 0.0), mask=slot < K)
