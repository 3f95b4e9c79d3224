"""One softmax over [window keys | compressed entries | sink], query tile by query tile.

    out_t = sum_j a_tj k_j,   a_t = softmax([scale q_t . k_j | sink_h]) over the keys that t sees

Keys are values. A tile's keys that all its queries share stand in one tensor with a row of zeros
at the end, whose logit is the sink: so one product gives the logits, and one the output. The
backward forms a long row's weights again, tile by tile: memory grows with L, and no (L, L) tensor
exists.

The indexer's loss (indexer.py) needs the tile's weights, so its gradient is formed in the forward
pass while they are there.

Legend: D documents, L tokens, Q of them in a tile, J = P + L window keys (P from a cache), E
entries, S keys that a tile's queries share (zeros among them), O of a query's own, K = S + O, h
heads, d head size, c indexer head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from posttrain.backbone import indexer
from posttrain.backbone.function import plain_backward
from posttrain.backbone.visible import Layout, Place, Tile, compact, restored, tiles

TILE = 64
"""Queries in a tile, at most; with many rows or heads fewer: it stays in cache."""

TILE_ROWS = 2048
"""Queries times heads times documents in a tile, at least 16 queries' worth."""

KEPT = 256
"""Rows of up to so many tokens keep their weights from forward to backward."""


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
    if not length:
        return q_DLhd, None
    size = min(TILE, max(16, TILE_ROWS // max(docs * heads, 1)))
    entry = window_DJd.new_zeros(docs, 0, window_DJd.shape[-1]) if entry_DEd is None else entry_DEd
    parts = (index.query, index.key, index.weight) if index else (None, None, None)
    plan = _Plan(layout, size, scale, index, length <= KEPT and torch.is_grad_enabled())
    with maybe_autocast(device_type=q_DLhd.device.type, enabled=False):
        out, loss = TiledAttention.apply(q_DLhd, window_DJd, entry, sink_h, *parts, plan)  # pyright: ignore[reportGeneralTypeIssues]
    return out, loss if index is not None and index.wants_loss else None


@dataclass(frozen=True)
class _Plan:
    layout: Layout
    size: int
    scale: float
    index: indexer.Index | None
    keeps_weights: bool


class TiledAttention(torch.autograd.Function):
    """`attend`; saves its inputs, which entries were chosen, and short rows' weights."""

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
        out, index, layout = torch.empty_like(q_DLhd), plan.index, plan.layout
        total = torch.zeros((), dtype=torch.float32, device=q_DLhd.device)
        grads = index.zero_gradients() if index is not None and index.wants_loss else None
        length, num_entries = q_DLhd.shape[1], entry_DEd.shape[1]
        places: list[Place] = []
        chosen: list[Tensor | None] = []
        kept: list[Tensor | None] = []
        for tile in tiles(layout, length, plan.size, num_entries, index):
            keys = keys_of(tile, window_DJd, entry_DEd)
            query = scaled(q_DLhd[:, tile.first : tile.end], plan.scale)
            weight = weights(query, keys, tile, sink_h)
            out[:, tile.first : tile.end] = combined(weight, keys)
            if grads is not None and index is not None and tile.chosen is not None:
                share = entry_shares(weight, keys, tile)
                has_query = layout.has_query(tile.first, tile.end)
                total += form_loss(index, tile, share, has_query, grads)
            place, entries = compact(tile)
            places.append(place)
            chosen.append(entries)
            kept.append(weight if plan.keeps_weights else None)
        # so alone checkpoints and the end of the backward let go of them
        inputs = q_DLhd, window_DJd, entry_DEd, sink_h
        ctx.save_for_backward(*inputs, *(grads or ()), *chosen, *kept)
        ctx.places, ctx.layout, ctx.scale = places, layout, plan.scale
        ctx.has_loss = grads is not None
        return out, total

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q_DLhd, window_DJd, entry_DEd, sink_h, *saved = ctx.saved_tensors
        num = 3 if ctx.has_loss else 0
        formed, per_tile = saved[:num], iter(saved[num:])
        chosen = [next(per_tile) for _ in ctx.places]
        grad_out, grad_loss = upstream
        grad_q, wide = torch.empty_like(q_DLhd), wide_type(q_DLhd)
        grad_window, grad_entry, grad_sink = (
            torch.zeros_like(x, dtype=wide) for x in (window_DJd, entry_DEd, sink_h)
        )
        for place, entries, weight in zip(ctx.places, chosen, per_tile, strict=True):
            tile = restored(place, entries, ctx.layout)
            keys = keys_of(tile, window_DJd, entry_DEd)
            query = scaled(q_DLhd[:, tile.first : tile.end], ctx.scale)
            weight = weights(query, keys, tile, sink_h) if weight is None else weight
            upstream_DQhd = grad_out[:, tile.first : tile.end].to(wide)
            slope = softmax_gradient(weight, upstream_DQhd, keys)
            grad_q[:, tile.first : tile.end] = combined(slope, keys).mul_(ctx.scale)
            grad_keys = key_gradients(weight, upstream_DQhd, slope, query, keys)
            add_to_keys(tile, grad_keys, grad_window, grad_entry)
            grad_sink += slope[..., keys[0].shape[1] - 1].sum((0, 1))
        return (
            grad_q,
            grad_window.to(window_DJd.dtype),
            grad_entry.to(entry_DEd.dtype),
            grad_sink.to(sink_h.dtype),
            *(g * grad_loss for g in formed),
            *(() if ctx.has_loss else (None, None, None)),
            None,
        )


def wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scaled(q_DQhd: Tensor, scale: float) -> Tensor:
    return q_DQhd.to(wide_type(q_DQhd)) * scale


def keys_of(tile: Tile, window_DJd: Tensor, entry_DEd: Tensor) -> list[Tensor]:
    """[shared keys (D, S, d): window, entries, zeros; the queries' own (D, Q, O, d) if any]."""
    low, high = tile.window_range
    parts, own = [window_DJd[:, low:high]], []
    if tile.chosen is not None:
        found = tile.chosen.of(entry_DEd)
        (parts if tile.chosen.index_DQK is None else own).append(found.to(wide_type(found)))
    parts.append(window_DJd.new_zeros(len(window_DJd), 1, window_DJd.shape[2]))
    return [torch.cat(parts, dim=1).to(wide_type(window_DJd)), *own]


def weights(query_DQhd: Tensor, keys: list[Tensor], tile: Tile, sink_h: Tensor) -> Tensor:
    """The softmax's weights (D, Q, h, K), the sink's at shared key S - 1."""
    logits = dots(query_DQhd, keys)
    logits.add_(bias(tile, logits.dtype).unsqueeze(2))
    logits[..., keys[0].shape[1] - 1] = sink_h.to(logits.dtype)
    return logits.softmax(dim=-1)


def bias(tile: Tile, dtype: torch.dtype) -> Tensor:
    """(D or 1, Q, K): -inf at keys that a query does not see, 0 elsewhere."""
    chosen, masks = tile.chosen, [tile.window_mask, tile.window_mask.new_ones(1, 1, 1)]
    if chosen is not None:
        masks.insert(1 if chosen.index_DQK is None else 2, chosen.mask)
    docs, queries = max(len(mask) for mask in masks), tile.end - tile.first
    is_seen = torch.cat([mask.expand(docs, queries, -1) for mask in masks], dim=-1)
    return torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, float("-inf"))


def entry_shares(weight_DQhK: Tensor, keys: list[Tensor], tile: Tile) -> Tensor:
    """The weights of the tile's entries."""
    low, high = tile.window_range
    shared = keys[0].shape[1]
    return weight_DQhK[..., shared:] if len(keys) > 1 else weight_DQhK[..., high - low : shared - 1]


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


def dots(x_DQhd: Tensor, keys: list[Tensor]) -> Tensor:
    parts = [dot(x_DQhd, k) for k in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def by_keys(weight_DQhK: Tensor, keys: list[Tensor]) -> tuple[Tensor, ...]:
    return weight_DQhK.split([k.shape[-2] for k in keys], dim=-1)


def combined(weight_DQhK: Tensor, keys: list[Tensor]) -> Tensor:
    parts = [combine(w, k) for w, k in zip(by_keys(weight_DQhK, keys), keys, strict=True)]
    return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def softmax_gradient(weight_DQhK: Tensor, grad_DQhd: Tensor, keys: list[Tensor]) -> Tensor:
    """The gradient of the logits (D, Q, h, K), the sink's among them: w (g - sum(w g))."""
    through = dots(grad_DQhd, keys)
    return torch.ops.aten._softmax_backward_data(through, weight_DQhK, -1, weight_DQhK.dtype)


def key_gradients(
    weight_DQhK: Tensor,
    grad_DQhd: Tensor,
    slope_DQhK: Tensor,
    query_DQhd: Tensor,
    keys: list[Tensor],
) -> list[Tensor]:
    """Of each set of keys, in its shape: as values, then as keys."""
    parts = zip(by_keys(weight_DQhK, keys), by_keys(slope_DQhK, keys), keys, strict=True)
    return [
        pull(w, grad_DQhd, is_shared=k.dim() == 3).add_(
            pull(slope, query_DQhd, is_shared=k.dim() == 3)
        )
        for w, slope, k in parts
    ]


def add_to_keys(
    tile: Tile, grad_keys: list[Tensor], grad_window: Tensor, grad_entry: Tensor
) -> None:
    """Add the gradients of a tile's keys to those of all."""
    low, high = tile.window_range
    grad_window[:, low:high] += grad_keys[0][:, : high - low]
    if tile.chosen is not None:
        of_entries = grad_keys[1] if len(grad_keys) > 1 else grad_keys[0][:, high - low : -1]
        tile.chosen.add_to(grad_entry, of_entries)


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
