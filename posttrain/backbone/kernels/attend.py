"""`tiles.attend` on the GPU: the same arguments and results, out of the kernels here.

Windows and entries of all documents are one pool of keys, and each query has a row of a table that
says which of them it attends to: its window, then its entries, all visible ones or the indexer's
choice. The indexer's loss is formed tile by tile as on CPU, from the attention that the chosen
entries received.

Run so far: triton 3.6's interpreter on CPU; on no GPU yet.

Legend: D documents, L tokens, J = P + L window keys (P from a cache), E entries, K chosen ones, T =
D L queries, h heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.backbone import indexer, tiles, visible
from posttrain.backbone.kernels.indexer_topk import top_entries
from posttrain.backbone.kernels.sparse_attention import attention_received, sparse_attention


def attend(
    q_DLhd: Tensor,
    window_DJd: Tensor,
    entry_DEd: Tensor | None,
    sink_h: Tensor,
    *,
    scale: float,
    layout: visible.Layout,
    index: indexer.Index | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs (D, L, h, d), and the indexer's loss summed over queries where `index` wants it."""
    docs, length = q_DLhd.shape[:2]
    if not length:
        return q_DLhd, None
    keys = [window_DJd.flatten(0, 1)] + ([] if entry_DEd is None else [entry_DEd.flatten(0, 1)])
    num_entries = 0 if entry_DEd is None else entry_DEd.shape[1]
    entry_DLK = chosen_entries(layout, docs, length, num_entries, index)
    first_D11 = torch.arange(docs, device=q_DLhd.device)[:, None, None] * num_entries + len(keys[0])
    entry_TK = torch.where(entry_DLK >= 0, entry_DLK + first_D11, -1).int().flatten(0, 1)
    window_TK = window_rows(layout, docs, length).flatten(0, 1)
    q_Thd, pool_Pd = q_DLhd.flatten(0, 1), torch.cat(keys)
    row_TK = torch.cat([window_TK, entry_TK], dim=1)
    out_Thd, logsumexp_Th = sparse_attention(q_Thd, pool_Pd, row_TK, sink_h, scale=scale)
    out_DLhd = out_Thd.view_as(q_DLhd)
    if index is None or not index.wants_loss:
        return out_DLhd, None
    share_TK = attention_received(q_Thd, pool_Pd, entry_TK, logsumexp_Th, scale=scale)
    share_DLK = share_TK.view(entry_DLK.shape)
    parts = (index.query, index.key, index.weight)
    return out_DLhd, FormedLoss.apply(*parts, index, layout, entry_DLK, share_DLK)  # pyright: ignore[reportReturnType]  # apply has no types


def window_rows(layout: visible.Layout, docs: int, length: int) -> Tensor:
    """Each query's window keys among the rows of (D J) window keys, (D, L, window) int32, -1 for
    those before the document's first token."""
    device = layout.length_D.device
    before_W = torch.arange(layout.window - 1, -1, -1, device=device)
    key_LW = torch.arange(length, device=device)[:, None] + layout.num_past - before_W
    position_DLW = layout.position_DQ(0, length)[..., None] - before_W
    row_D11 = torch.arange(docs, device=device)[:, None, None] * (length + layout.num_past)
    return torch.where(position_DLW >= 0, key_LW + row_D11, -1).int()


def chosen_entries(
    layout: visible.Layout, docs: int, length: int, num_entries: int, index: indexer.Index | None
) -> Tensor:
    """The numbers of each query's entries in its document, ascending, (D, L, K), -1 for none."""
    seen = layout.num_visible(length, num_entries)
    if index is None or seen <= index.top_k:
        number_E = torch.arange(seen, device=layout.length_D.device)
        visible_DLE = layout.entry_mask(0, length, seen).expand(docs, length, seen)
        return torch.where(visible_DLE, number_E, -1)
    count_DL = ((layout.position_DQ(0, length) + 1) // layout.rate).clamp(max=seen)
    first_D1 = torch.arange(docs, device=count_DL.device)[:, None] * num_entries
    chosen_TK = top_entries(
        index.query.flatten(0, 1),
        index.weight.flatten(0, 1),
        index.key.flatten(0, 1),
        first_D1.expand(docs, length).flatten().int(),
        count_DL.expand(docs, length).flatten().int(),
        top_k=index.top_k,
        most_visible=seen,
    )
    chosen_DLK = chosen_TK.view(docs, length, -1)
    return torch.where(chosen_DLK >= 0, chosen_DLK - first_D1[..., None], -1)


class FormedLoss(torch.autograd.Function):
    """The indexer's loss; its gradients to the index are formed at once, a tile at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query_DLhc: Tensor,
        key_DEc: Tensor,
        weight_DLh: Tensor,
        index: indexer.Index,
        layout: visible.Layout,
        entry_DLK: Tensor,
        share_DLK: Tensor,
    ) -> Tensor:
        grads, length = index.zero_gradients(), entry_DLK.shape[1]
        total = torch.zeros((), dtype=torch.float32, device=entry_DLK.device)
        for first in range(0, length if entry_DLK.shape[2] else 0, tiles.TILE):
            end = min(first + tiles.TILE, length)
            number = entry_DLK[:, first:end]
            chosen = visible.Chosen(number >= 0, number.clamp(min=0))
            tile = visible.Tile(first, end, (0, 0), chosen.mask[..., :0], chosen)
            share_DQhK = share_DLK[:, first:end, None]  # the heads' sum is one head here
            total += tiles.form_loss(index, tile, share_DQhK, layout.has_query(first, end), grads)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(g * grads[0] for g in ctx.saved_tensors), None, None, None, None)
