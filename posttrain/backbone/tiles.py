"""One softmax over [window keys | compressed entries | sink], query tile by query tile.

    out_t = sum_j a_tj k_j,   a_t = softmax([scale q_t . k_j | sink_h]) over the keys that t sees

Keys are values. A short row is one tile and goes through autograd; a long one is cut, each tile
reads its window and its entries alone, and the backward pass recomputes it: memory grows with L,
and no (L, L) tensor exists. Where a query may see more entries than the indexer's top-k, its tile
either masks all visible ones or, when they are many times as many, gathers the chosen.

The indexer's loss (indexer.py) needs the tile's weights, so its gradient is formed in the forward
pass while they are there.

Legend: D documents, L tokens, Q of them in a tile, J = P + L window keys (P from a cache), E
entries, K chosen entries, h heads, d head size, c indexer head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone import indexer

ONE_TILE = 128
"""Rows of up to so many tokens are one tile."""

TILE = 64
"""Queries in a longer row's tile, at most; with many rows or heads fewer: it stays in cache."""

TILE_ROWS = 4096
"""Queries times heads times documents in a tile, at least 16 queries' worth."""

GATHER = 8
"""From so many times top-k visible entries on, gathering the chosen beats masking the rest."""


@dataclass(frozen=True)
class Layout:
    """What of a group of rows is visible to whom."""

    length_D: Tensor
    start_D: Tensor | None
    """Tokens before the first of these, by row; None: none."""
    longest_start: int
    window: int
    num_past: int
    """P: window keys from a cache, in front of the new ones."""
    rate: int
    """Tokens an entry; 0: the layer has no entries."""

    def position_DQ(self, first: int, end: int) -> Tensor:
        """Absolute positions of queries first .. end - 1, (D or 1, Q)."""
        place_1Q = torch.arange(first, end, device=self.length_D.device)[None]
        return place_1Q if self.start_D is None else place_1Q + self.start_D[:, None]

    def window_range(self, first: int, end: int) -> tuple[int, int]:
        """The window keys that a tile's queries can see, as a range of J."""
        return max(0, first + self.num_past - self.window + 1), end + self.num_past

    def window_mask(self, first: int, end: int) -> Tensor:
        """(D or 1, Q, keys of the range)."""
        low, high = self.window_range(first, end)
        device = self.length_D.device
        query_Q1 = torch.arange(first, end, device=device)[:, None] + self.num_past
        key_J = torch.arange(low, high, device=device)
        distance = query_Q1 - key_J
        mask = ((distance >= 0) & (distance < self.window))[None]
        if self.start_D is None:
            return mask
        return mask & (key_J + (self.start_D[:, None, None] - self.num_past) >= 0)

    def num_visible(self, end: int, num_entries: int) -> int:
        """Entries that any query before `end` sees."""
        if not self.rate:
            return 0
        return min(num_entries, (self.longest_start + end) // self.rate)

    def entry_mask(self, first: int, end: int, num_entries: int) -> Tensor:
        """(D or 1, Q, num_entries): query t sees entry w iff w < (t + 1) // rate."""
        seen = (self.position_DQ(first, end) + 1) // max(self.rate, 1)
        return torch.arange(num_entries, device=seen.device) < seen[..., None]

    def has_query(self, first: int, end: int) -> Tensor:
        """(D, Q): real queries that see at least one entry."""
        place_Q = torch.arange(first, end, device=self.length_D.device)
        sees = self.position_DQ(first, end) + 1 >= self.rate
        return (place_Q < self.length_D[:, None]) & sees


@dataclass(frozen=True)
class Chosen:
    """The entries of a tile's queries: shared (D, K, d) under a mask, or gathered (D, Q, K, d)."""

    mask: Tensor
    """(D or 1, Q, K)."""
    index_DQK: Tensor | None = None
    """Gathered entries by number; None: the first K."""
    is_all: bool = False
    """All visible ones: the mask follows from the tile's place."""

    def of(self, entry_DEx: Tensor) -> Tensor:
        """The entries themselves, or the indexer's keys of them."""
        if self.index_DQK is None:
            return entry_DEx[:, : self.mask.shape[-1]]
        row_D11 = torch.arange(len(entry_DEx), device=entry_DEx.device)[:, None, None]
        return entry_DEx[row_D11, self.index_DQK]

    def add_to(self, grad_DEx: Tensor, grad: Tensor) -> None:
        """Add what the entries of `of` got to the gradient of all."""
        if self.index_DQK is None:
            grad_DEx[:, : self.mask.shape[-1]] += grad
            return
        rows, num_entries, _ = grad_DEx.shape
        first_D11 = torch.arange(rows, device=grad.device)[:, None, None] * num_entries
        flat = (self.index_DQK + first_D11).flatten()
        grad_DEx.flatten(0, 1).index_add_(0, flat, grad.flatten(0, 2).to(grad_DEx.dtype))


def dot(x_DQhd: Tensor, keys: Tensor) -> Tensor:
    """x . keys, (D, Q, h, K), of shared keys (D, K, d) or each query's own (D, Q, K, d)."""
    if keys.dim() == 3:
        return torch.bmm(x_DQhd.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, x_DQhd.shape[1:3])
    return x_DQhd @ keys.transpose(-1, -2)


def combine(weight_DQhK: Tensor, keys: Tensor) -> Tensor:
    """sum_k weight[k] keys[k], (D, Q, h, d)."""
    if keys.dim() == 3:
        return torch.bmm(weight_DQhK.flatten(1, 2), keys).unflatten(1, weight_DQhK.shape[1:3])
    return weight_DQhK @ keys


def pull(weight_DQhK: Tensor, x_DQhd: Tensor, *, is_shared: bool) -> Tensor:
    """The keys' gradient, in the keys' shape: sum over heads (and queries) of weight times x."""
    if is_shared:
        return torch.bmm(weight_DQhK.flatten(1, 2).transpose(1, 2), x_DQhd.flatten(1, 2))
    return weight_DQhK.transpose(-1, -2) @ x_DQhd


@dataclass(frozen=True)
class Tile:
    """What the queries first .. end - 1 attend to."""

    first: int
    end: int
    window_range: tuple[int, int]
    window_mask: Tensor
    chosen: Chosen | None

    def keys(self, window_DJd: Tensor, entry_DEd: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pairs (keys, mask) of the window and of the entries."""
        low, high = self.window_range
        found = [(window_DJd[:, low:high], self.window_mask)]
        if self.chosen is not None and entry_DEd is not None:
            found.append((self.chosen.of(entry_DEd), self.chosen.mask))
        return found


def weights(
    q_DQhd: Tensor, keys: list[tuple[Tensor, Tensor]], sink_h: Tensor, scale: float
) -> list[Tensor]:
    """The softmax's share of each set of keys (D, Q, h, K), the sink's (D, Q, h, 1) at the end."""
    wide = torch.promote_types(q_DQhd.dtype, torch.float32)
    logits = [
        dot(q_DQhd, k).to(wide).mul_(scale).masked_fill_(~mask.unsqueeze(2), float("-inf"))
        for k, mask in keys
    ]
    sink = sink_h.to(wide).view(1, 1, -1, 1).expand(*logits[0].shape[:3], 1)
    sizes = [part.shape[-1] for part in logits]
    return list(torch.cat([*logits, sink], dim=-1).softmax(dim=-1).split([*sizes, 1], dim=-1))


def attend_tile(
    q_DQhd: Tensor, keys: list[tuple[Tensor, Tensor]], sink_h: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (D, Q, h, d), and the `weights` behind them."""
    shares = weights(q_DQhd, keys, sink_h, scale)
    parts = [combine(w.to(k.dtype), k) for w, (k, _) in zip(shares, keys, strict=False)]
    return sum(parts[1:], parts[0]), shares


def choose(
    layout: Layout, first: int, end: int, num_entries: int, index: indexer.Index | None
) -> Chosen | None:
    """Which entries a tile's queries attend to; ties go to the lowest number on every path."""
    seen = layout.num_visible(end, num_entries)
    if not seen:
        return None
    mask = layout.entry_mask(first, end, seen)
    if index is None or seen <= index.top_k:
        return Chosen(mask, is_all=True)
    score_DQE = index.scores(first, end, seen).masked_fill_(~mask, float("-inf"))
    if seen < GATHER * index.top_k:
        return Chosen(indexer.top_k_mask(score_DQE, index.top_k) & mask)
    number = indexer.top_k_numbers(score_DQE, index.top_k)
    return Chosen(number >= 0, number.clamp(min=0))


def tiles(
    layout: Layout, length: int, size: int, num_entries: int, index: indexer.Index | None
) -> Iterator[Tile]:
    """The tiles of `length` queries, `size` in each."""
    for first in range(0, length, size):
        end = min(first + size, length)
        chosen = choose(layout, first, end, num_entries, index)
        mask = layout.window_mask(first, end)
        yield Tile(first, end, layout.window_range(first, end), mask, chosen)


def attend(
    q_DLhd: Tensor,
    window_DJd: Tensor,
    entry_DEd: Tensor | None,
    sink_h: Tensor,
    *,
    scale: float,
    layout: Layout,
    index: indexer.Index | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (D, L, h, d), and the indexer's loss summed over queries where `index` wants it."""
    docs, length, heads, _ = q_DLhd.shape
    size = min(TILE, max(16, TILE_ROWS // max(docs * heads, 1)))
    num_entries = 0 if entry_DEd is None else entry_DEd.shape[1]
    wants_loss = index is not None and index.wants_loss
    if not length:
        return q_DLhd, None
    if length <= ONE_TILE:
        (tile,) = tiles(layout, length, length, num_entries, index)
        return _attend_once(q_DLhd, window_DJd, entry_DEd, sink_h, scale, layout, tile, index)
    entry = window_DJd.new_zeros(docs, 0, window_DJd.shape[-1]) if entry_DEd is None else entry_DEd
    parts = (index.query, index.key, index.weight) if index else (None, None, None)
    plan = _Plan(layout, size, scale, index)
    out, loss = TiledAttention.apply(q_DLhd, window_DJd, entry, sink_h, *parts, plan)  # pyright: ignore[reportGeneralTypeIssues]
    return out, loss if wants_loss else None


def _attend_once(
    q_DLhd: Tensor,
    window_DJd: Tensor,
    entry_DEd: Tensor | None,
    sink_h: Tensor,
    scale: float,
    layout: Layout,
    tile: Tile,
    index: indexer.Index | None,
) -> tuple[Tensor, Tensor | None]:
    """All queries as one tile, through autograd."""
    out, shares = attend_tile(q_DLhd, tile.keys(window_DJd, entry_DEd), sink_h, scale)
    loss = None
    if index is not None and index.wants_loss and tile.chosen is not None:
        score = index.chosen_scores(tile.first, tile.end, tile.chosen.of(index.key))
        loss = indexer.loss(
            score, shares[1].detach(), tile.chosen.mask, layout.has_query(tile.first, tile.end)
        )
    return out, loss


@dataclass(frozen=True)
class _Plan:
    layout: Layout
    size: int
    scale: float
    index: indexer.Index | None


class TiledAttention(torch.autograd.Function):
    """`attend` of long rows; saves its inputs and which entries were chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        q_DLhd: Tensor,
        window_DJd: Tensor,
        entry_DEd: Tensor,
        sink_h: Tensor,
        iq: Tensor | None,
        ik: Tensor | None,
        iw: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor]:
        out, index = torch.empty_like(q_DLhd), plan.index
        total = torch.zeros((), dtype=torch.float32, device=q_DLhd.device)
        grads = index.zero_gradients() if index is not None and index.wants_loss else None
        kept: list[Kept] = []
        num_entries = entry_DEd.shape[1]
        for tile in tiles(plan.layout, q_DLhd.shape[1], plan.size, num_entries, index):
            span = slice(tile.first, tile.end)
            keys = tile.keys(window_DJd, entry_DEd)
            out[:, span], shares = attend_tile(q_DLhd[:, span], keys, sink_h, plan.scale)
            if grads is not None and index is not None and tile.chosen is not None:
                has_query = plan.layout.has_query(tile.first, tile.end)
                total += form_loss(index, tile, shares[1], has_query, grads)
            kept.append(compact(tile))
        ctx.save_for_backward(q_DLhd, window_DJd, entry_DEd, sink_h, *(grads or ()))
        ctx.tiles, ctx.plan, ctx.has_loss = kept, plan, grads is not None
        return out, total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q_DLhd, window_DJd, entry_DEd, sink_h, *formed = ctx.saved_tensors
        grad_out, grad_loss = upstream
        grad_q = torch.empty_like(q_DLhd)
        wide = torch.promote_types(q_DLhd.dtype, torch.float32)
        grad_window = torch.zeros_like(window_DJd, dtype=wide)
        grad_entry = torch.zeros_like(entry_DEd, dtype=wide)
        grad_sink = torch.zeros_like(sink_h, dtype=wide)
        for kept in ctx.tiles:
            whole = restored(kept, ctx.plan.layout)
            span = slice(whole.first, whole.end)
            keys = whole.keys(window_DJd, entry_DEd)
            grad_q[:, span], grad_keys, sink = tile_gradients(
                q_DLhd[:, span], grad_out[:, span], keys, sink_h, ctx.plan.scale
            )
            low, high = whole.window_range
            grad_window[:, low:high] += grad_keys[0]
            if whole.chosen is not None:
                whole.chosen.add_to(grad_entry, grad_keys[1])
            grad_sink += sink
        return (
            grad_q,
            grad_window.to(window_DJd.dtype),
            grad_entry.to(entry_DEd.dtype),
            grad_sink.to(sink_h.dtype),
            *(g * grad_loss for g in formed),
            *(() if ctx.has_loss else (None, None, None)),
            None,
        )


def tile_gradients(
    q_DQhd: Tensor,
    grad_DQhd: Tensor,
    keys: list[tuple[Tensor, Tensor]],
    sink_h: Tensor,
    scale: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Gradients of a tile's queries, of each set of keys, and of the sinks."""
    shares = weights(q_DQhd, keys, sink_h, scale)
    wide, dtype = shares[0].dtype, q_DQhd.dtype
    through = [dot(grad_DQhd, k).to(wide) for k, _ in keys]
    delta = sum((w * g).sum(-1, keepdim=True) for w, g in zip(shares, through, strict=False))
    grad_logits = [(w * (g - delta)).to(dtype) for w, g in zip(shares, through, strict=False)]
    grad_keys: list[Tensor] = []
    for share, grad, (k, _) in zip(shares, grad_logits, keys, strict=False):
        is_shared = k.dim() == 3
        from_logits = pull(grad, q_DQhd, is_shared=is_shared).mul_(scale)
        grad_keys.append(from_logits + pull(share.to(dtype), grad_DQhd, is_shared=is_shared))
    outs = [combine(g, k) for g, (k, _) in zip(grad_logits, keys, strict=True)]
    grad_sink = -(shares[-1] * delta).sum(dim=(0, 1, 3))
    return sum(outs[1:], outs[0]) * scale, grad_keys, grad_sink


def form_loss(
    index: indexer.Index, tile: Tile, share_DQhK: Tensor, has_query_DQ: Tensor, grads: list[Tensor]
) -> Tensor:
    """A tile's indexer loss; its gradients are added to `grads` (of query, key, weight).

    By hand: autograd inside a forward pass would meet the hooks of gradient checkpointing.
    """
    assert tile.chosen is not None
    span, mask = slice(tile.first, tile.end), tile.chosen.mask
    query, weight_DQh = index.query[:, span].to(share_DQhK.dtype), index.weight[:, span]
    key = tile.chosen.of(index.key).to(share_DQhK.dtype)
    similarity = dot(query, key).relu_()
    score = (weight_DQh.unsqueeze(-2) @ similarity).squeeze(-2)
    loss = indexer.loss(score, share_DQhK, mask, has_query_DQ)
    grad_DQ1K = indexer.loss_gradient(score, share_DQhK, mask, has_query_DQ).unsqueeze(2)
    grads[2][:, span] = (similarity * grad_DQ1K).sum(-1)
    through = (similarity > 0) * weight_DQh.unsqueeze(-1) * grad_DQ1K
    grads[0][:, span] = combine(through, key)
    tile.chosen.add_to(grads[1], pull(through, query, is_shared=key.dim() == 3))
    return loss


Kept = tuple[int, int, "int | Tensor | None"]
"""A tile's place, and of its entries: how many if all, a mask, or their numbers, -1 for none."""


def compact(tile: Tile) -> Kept:
    """A tile in few bytes, from forward to backward."""
    chosen = tile.chosen
    if chosen is None:
        return tile.first, tile.end, None
    if chosen.is_all:
        return tile.first, tile.end, chosen.mask.shape[-1]
    if chosen.index_DQK is None:
        return tile.first, tile.end, chosen.mask
    number = chosen.index_DQK.masked_fill(~chosen.mask, -1)
    return tile.first, tile.end, number.to(torch.int32)


def restored(kept: Kept, layout: Layout) -> Tile:
    """The tile that `compact` was given."""
    first, end, entries = kept
    if entries is None:
        chosen = None
    elif isinstance(entries, int):
        chosen = Chosen(layout.entry_mask(first, end, entries), is_all=True)
    elif entries.dtype == torch.bool:
        chosen = Chosen(entries)
    else:
        chosen = Chosen(entries >= 0, entries.long().clamp_(min=0))
    mask = layout.window_mask(first, end)
    return Tile(first, end, layout.window_range(first, end), mask, chosen)
