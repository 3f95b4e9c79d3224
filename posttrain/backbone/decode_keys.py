"""The attention of tokens that each go with a slot's keys (decode.py).

What a token gets does not depend, to the bit, on which tokens go with it, where a product's rows do
not (torch on CPU, in whole blocks of `ROWS`): no sum runs over a length that other tokens set but
with exact zeros at its end, in products of at most `KEYS` keys, in which zeros change no sum.

Legend: T tokens, B slots, D slots whose keys are read, E entries, K keys, h heads, d head size, c
indexer head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.cache import CompressedStore
from posttrain.backbone.experts import ROWS

KEYS = 128
"""Keys in one product; a longer sum's order may follow its length."""

SCORES_AT_ONCE = 1 << 18
"""Indexer scores of single heads that are in memory at a time: they stay in a CPU's cache."""


@dataclass(frozen=True)
class Part:
    """Tokens first .. end - 1 of a step, as many of each of the slots `slot_D`; None: one of each
    of the first slots."""

    first: int
    end: int
    slot_D: Tensor | None = None

    def of(self, x_BKX: Tensor) -> Tensor:
        """Of what all slots have, these slots'."""
        return x_BKX[: self.end - self.first] if self.slot_D is None else x_BKX[self.slot_D]


@dataclass(frozen=True)
class Entries:
    """The entries that a step's tokens attend to, with each token's bias (T, 1, K)."""

    key: Tensor
    """(B, K, d) of all slots, or (T, K, d) where each token has chosen its own."""
    bias: Tensor
    is_own: bool

    def of(self, part: Part) -> tuple[Tensor, Tensor]:
        bias = self.bias[part.first : part.end]
        return self.key[part.first : part.end] if self.is_own else part.of(self.key), bias


def whole(num: int) -> int:
    """`num` rounded up to whole blocks of `ROWS`."""
    return -(-num // ROWS) * ROWS


def bias_of(is_hidden_BK: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where hidden, 0 elsewhere, (B, 1, K)."""
    bias = torch.zeros_like(is_hidden_BK, dtype=dtype)
    return bias.masked_fill_(is_hidden_BK, float("-inf")).unsqueeze(1)


def attend(
    q_Thd: Tensor, keys: list[tuple[Tensor, Tensor]], sink_h: Tensor, scale: float
) -> Tensor:
    """(T, h, d): one softmax over the sink and all sets of keys (D, K, d), each of T / D tokens,
    with each token's bias (T, 1, K); the keys are the values. Logits are put side by side, keys
    never; the sink stands first, in a block of its own."""
    tokens, heads, size = q_Thd.shape
    sink_hS = F.pad(sink_h.to(q_Thd.dtype).unsqueeze(1), (0, ROWS - 1), value=float("-inf"))
    logits, products = [sink_hS.expand(tokens, -1, -1)], list(_blocks(keys))
    for k, bias in products:
        q = q_Thd.reshape(len(k), -1, size)
        if len(k) < tokens:
            bias = bias.expand(-1, heads, -1).reshape(len(k), -1, k.shape[1])
        dots = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        logits.append(dots.view(tokens, heads, k.shape[1]))
    weights = torch.cat(logits, dim=-1).softmax(dim=-1, dtype=torch.float32)
    shares = weights.to(q_Thd.dtype).split([ROWS, *(k.shape[1] for k, _ in products)], dim=-1)
    out: Tensor | None = None
    for share, (k, _) in zip(shares[1:], products, strict=True):
        share = share.reshape(len(k), -1, k.shape[1])
        shape = (len(k), -1, size)
        out = torch.bmm(share, k) if out is None else torch.baddbmm(out.view(shape), share, k)
    assert out is not None
    return out.view(q_Thd.shape)


def _blocks(keys: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The sets of keys and their biases, at most `KEYS` keys in each."""
    for k, bias in keys:
        if k.shape[1] <= KEYS:
            yield k, bias
        else:
            yield from zip(k.split(KEYS, dim=1), bias.split(KEYS, dim=2), strict=True)


def chosen(
    score_TE: Tensor, store: CompressedStore, slot_T: Tensor, is_hidden_TE: Tensor, top_k: int
) -> Entries:
    """Each token's `top_k` best entries that are not hidden, in their order, in whole blocks: so
    where it sees no more than that, they stand as they do where nobody has to choose."""
    index_TK = best(score_TE.masked_fill_(is_hidden_TE, float("-inf")), top_k).sort(dim=-1).values
    is_hidden_TK = is_hidden_TE.gather(1, index_TK)
    if fill := whole(top_k) - index_TK.shape[1]:
        index_TK, is_hidden_TK = F.pad(index_TK, (0, fill)), F.pad(is_hidden_TK, (0, fill), value=1)
    entry_TKd = store.entry_BEC[slot_T[:, None], index_TK]
    return Entries(entry_TKd, bias_of(is_hidden_TK, entry_TKd.dtype), is_own=True)


def scores(
    q_Thc: Tensor, key_BEc: Tensor, weight_Th: Tensor, parts: tuple[Part, ...] = ()
) -> Tensor:
    """sum_h w[h] relu(q[h] . k[e]), (T, E) in float32 (V4 report eq. 16)."""
    tokens, heads, size = q_Thc.shape
    q_Thc, weight_T1h = q_Thc.to(weight_Th.dtype), weight_Th.unsqueeze(1)
    block = whole(max(1024, SCORES_AT_ONCE // max(tokens * heads, 1)))
    found: list[Tensor] = []
    for part in parts or (Part(0, tokens),):
        span = slice(part.first, part.end)
        of_part: list[Tensor] = []
        for keys in part.of(key_BEc).split(block, dim=1):
            q = q_Thc[span].reshape(len(keys), -1, size)
            dots = torch.bmm(q, keys.to(q.dtype).transpose(1, 2)).relu_()
            dots_ThE = dots.view(-1, heads, keys.shape[1])
            of_part.append(torch.bmm(weight_T1h[span], dots_ThE).squeeze(1))
        found.append(of_part[0] if len(of_part) == 1 else torch.cat(of_part, dim=1))
    return found[0] if len(found) == 1 else torch.cat(found)


def best(score_BE: Tensor, top_k: int) -> Tensor:
    """The entries with the `top_k` highest scores (B, top_k); of equal ones the lowest.

    The best are in the top_k blocks that lead by (their highest score, lowest index): were one of
    them in another block, each of those would hold a better entry, or an equal one of lower index.
    So only these blocks are looked into, about 2 sqrt(E top_k) scores.
    """
    batch, num_entries = score_BE.shape
    block = 1 << int(math.log2(max(num_entries / top_k, 1.0)) / 2)
    if block == 1:
        return ranks(score_BE).topk(min(top_k, num_entries), dim=-1).indices
    score_BE = F.pad(score_BE, (0, -num_entries % block), value=float("-inf"))
    score_BNn = score_BE.view(batch, -1, block)
    block_BK = ranks(score_BNn.amax(dim=-1)).topk(top_k, dim=-1).indices
    block_BK = block_BK.sort(dim=-1).values  # in order: then so are the entries in them
    entry_BC = score_BNn.gather(1, block_BK.unsqueeze(-1).expand(-1, -1, block)).flatten(1)
    order_BK = ranks(entry_BC).topk(top_k, dim=-1).indices
    return block_BK.gather(1, order_BK // block) * block + order_BK % block


def ranks(score_BN: Tensor) -> Tensor:
    """int64 (B, N) in the order of (score, lowest index), no two of a row alike: `topk` promises
    no order among ties. A float's bits, those of a negative one flipped, order as it does."""
    bits = (score_BN.float() + 0.0).view(torch.int32).long()  # -0 + 0 = 0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) - torch.arange(score_BN.shape[1], device=score_BN.device)
