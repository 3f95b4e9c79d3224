"""The lightning indexer's choice (V4 report 2.3.1 eqs. 13-17): each query's top-k entries, exactly.

score[t, e] = sum_h w[t, h] relu(q[t, h] . key[e]) over the entries a query sees, a range of the
keys of all documents. The k best are chosen, ties to the lowest entry.

Scores of a tile of queries at a time lie in a buffer of bounded size. A query's k-th best score is
found bit by bit: floats are turned into integers of the same order, and each of 32 counts settles
one bit. Then one pass in the order of the entries takes all above it and, of those equal to it, the
first. No sort, no atomics, no dependence on tiles.

Run so far: triton 3.6's interpreter on CPU. Compiled for sm_80 and sm_90, without spills at V4's
sizes; run on no GPU yet, so block sizes are untuned. float32 goes without tensor cores.

Legend: T tokens (queries), E entries of all documents, h heads, c head size, K = top_k.
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
from torch import Tensor

from posttrain.backbone.kernels.launch import ceil_div, dot_type, jit, power_of_two

SCORE_BYTES = 256 * 2**20
"""Size of the buffer of scores: memory alone depends on it, no result does."""

SELECT_BLOCK = 4096
"""Scores that a query looks at at once."""


def reference(
    q_Thc: Tensor, weight_Th: Tensor, key_Ec: Tensor, first_T: Tensor, count_T: Tensor, top_k: int
) -> Tensor:
    """The same from all scores (T, E) and a stable sort."""
    entry_E = torch.arange(len(key_Ec), device=key_Ec.device)
    from_first_TE = entry_E - first_T[:, None]
    visible_TE = (from_first_TE >= 0) & (from_first_TE < count_T[:, None])
    score_TE = torch.einsum("thc,ec->the", q_Thc, key_Ec).relu()
    score_TE = torch.einsum("the,th->te", score_TE, weight_Th)
    score_TE = score_TE.masked_fill(~visible_TE, float("-inf"))
    best_TK = score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    is_none_TK = ~visible_TE.gather(1, best_TK)
    best_TK = best_TK.masked_fill(is_none_TK, len(key_Ec)).sort(dim=-1).values
    best_TK = best_TK.masked_fill(best_TK == len(key_Ec), -1)
    return torch.nn.functional.pad(best_TK, (0, top_k - best_TK.shape[1]), value=-1).int()


@torch.no_grad()
def top_entries(
    q_Thc: Tensor,
    weight_Th: Tensor,
    key_Ec: Tensor,
    first_T: Tensor,
    count_T: Tensor,
    *,
    top_k: int,
    most_visible: int,
) -> Tensor:
    """The chosen rows of `key_Ec`, ascending, (T, top_k) int32; -1 where a query sees fewer.

    Args:
        q_Thc: queries, bfloat16, float16 or float32; key_Ec of the same dtype.
        weight_Th: the heads' weights, all factors included; float32.
        first_T, count_T: int32, query t sees the entries first[t] .. first[t] + count[t] - 1.
        most_visible: no count is larger (known without asking the GPU).
    """
    q_Thc, key_Ec, first_T, count_T = (x.contiguous() for x in (q_Thc, key_Ec, first_T, count_T))
    weight_Th = weight_Th.float().contiguous()
    tokens, heads, size = q_Thc.shape
    chosen_TK = torch.full((tokens, top_k), -1, dtype=torch.int32, device=q_Thc.device)
    tile = min(max(1, SCORE_BYTES // max(1, 4 * most_visible)), max(tokens, 1))
    order = torch.empty(tile, most_visible, dtype=torch.int32, device=q_Thc.device)
    most = 16 if q_Thc.dtype == torch.float32 else 64  # no tensor cores: registers overflow
    sizes = {
        "H": heads,
        "C": size,
        "E": most_visible,
        "BLOCK_H": power_of_two(heads, least=16, most=most),
        "BLOCK_E": most,  # the same whatever the call, so that a score's bits are
        "BLOCK_C": power_of_two(size, least=16),
        "DOT": dot_type(q_Thc),
    }
    select_block = power_of_two(most_visible, most=SELECT_BLOCK)
    with torch.cuda.device_of(q_Thc):
        for start in range(0, tokens, tile):
            here = slice(start, start + tile)
            q, count, first = q_Thc[here], count_T[here], first_T[here]
            grid = (len(q), ceil_div(most_visible, most))
            _score[grid](q, weight_Th[here], key_Ec, first, count, order, **sizes)
            _select[(len(q),)](
                order, first, count, chosen_TK[here], top_k, most_visible, BLOCK_E=select_block
            )
    return chosen_TK


@jit
def _score(
    q,
    weight,
    key,
    first,
    count,
    order,
    H,
    C,
    E,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOT: tl.constexpr,
):
    """One query and BLOCK_E of the entries it sees a program; scores as ordered integers."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    seen = entry < tl.load(count + token)
    if tl.program_id(1) * BLOCK_E < tl.load(count + token):
        c = tl.arange(0, BLOCK_C)
        row = (tl.load(first + token) + entry).to(tl.int64)
        inside = seen[:, None] & (c < C)[None, :]
        keys = tl.load(key + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(DOT)
        total = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, H, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            place = (token * H + head)[:, None] * C + c[None, :]
            inside = (head < H)[:, None] & (c < C)[None, :]
            queries = tl.load(q + place, mask=inside, other=0.0).to(DOT)
            gain = tl.load(weight + token * H + head, mask=head < H, other=0.0)
            similarity = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            total += tl.sum(tl.maximum(similarity, 0.0) * gain[:, None], 0)
        # as integers of the same order: the bits, those of negative numbers turned about (a sum
        # that began at 0 is never -0, which would not tie with 0)
        bits = total.to(tl.int32, bitcast=True)
        value = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tl.store(order + token * E + entry, value, mask=seen)


@jit
def _select(order, first, count, chosen, top_k, E, BLOCK_E: tl.constexpr):
    """One query a program. `least` grows to the k-th best, bit by bit from the highest; it stays
    below all scores if a query sees no more than k."""
    token = tl.program_id(0).to(tl.int64)
    visible = tl.load(count + token)
    order += token * E
    chosen += token * top_k
    least = tl.full((), -2147483648, tl.int32)
    above = tl.full((), 0, tl.int32)  # entries that beat it
    if visible > top_k:
        for bit in range(0, 32):
            trial = least ^ (tl.full((), 1, tl.int32) << (31 - bit))
            reach = tl.full((), 0, tl.int32)
            for start in range(0, visible, BLOCK_E):
                entry = start + tl.arange(0, BLOCK_E)
                value = tl.load(order + entry, mask=entry < visible, other=-2147483648)
                reach += tl.sum((value >= trial).to(tl.int32), 0)
            above = tl.where(reach >= top_k, above, reach)
            least = tl.where(reach >= top_k, trial, least)
    place = tl.load(first + token)
    taken = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for start in range(0, visible, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E)
        value = tl.load(order + entry, mask=entry < visible, other=-2147483648)
        tied = (value == least).to(tl.int32)
        takes = (value > least) | ((tied != 0) & (ties + tl.cumsum(tied, 0) <= top_k - above))
        slot = taken + tl.cumsum(takes.to(tl.int32), 0) - 1
        tl.store(chosen + slot, place + entry, mask=takes & (entry < visible))
        taken += tl.sum(takes.to(tl.int32), 0)
        ties += tl.sum(tied, 0)
