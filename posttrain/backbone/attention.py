"""V4 attention: one softmax over [window keys | compressed entries | sink], one shared key = value
head.

Legend: T tokens, D documents (of a group of like ones), L tokens of the longest, J window keys, E
entries, h heads, d head size, X projected channels of a compressor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import indexer, past, tiles, visible
from posttrain.backbone.auxiliary import attach, touch
from posttrain.backbone.cache import V4Cache
from posttrain.backbone.compressor import compress, compress_on
from posttrain.backbone.fake_quant import rounded_index, rounded_kv
from posttrain.backbone.kernels import use_kernels
from posttrain.backbone.norm import take_own_norms
from posttrain.backbone.rope import NormAndRotate, rotate, rotations
from posttrain.backbone.routing import RouteTape
from posttrain.backbone.segments import Documents, Rows


@dataclass(frozen=True)
class Context:
    """What every layer of one forward shares."""

    documents: Documents
    rotation_T: dict[str, Tensor]
    """By rope type ("main", "compress"): each token's rotation (T, r/2)."""
    inv_freq: Tensor
    """Of the compressed layers' RoPE, for the entries."""
    scaling: float
    window: int
    cache: V4Cache | None = None
    slot_D: Tensor | None = None
    """The cache's slot of each document."""
    longest_start: int = 0
    """The most tokens that any slot holds already."""
    indexer_loss_scale: float | Tensor | None = None
    """The gradient of each layer's indexer loss, a mean over tokens; None: it is not wanted."""
    is_indexer_warmup: bool = False
    """Attend to all visible entries: the indexer learns from dense attention first."""
    balance_loss_scale: float | Tensor | None = None
    """The gradient of each MoE layer's balance loss; None: it is not wanted."""
    tape: RouteTape | None = None
    """Takes down the experts that tokens go to, or tells them."""
    _rotation_E: dict[tuple[int, int], Tensor] = field(
        default_factory=dict[tuple[int, int], Tensor]
    )

    def entry_rotation(self, rate: int, num_entries: int, start_D: Tensor | None) -> Tensor:
        """Rotations of entries by their windows' first positions: (E, r/2), or (D, E, r/2) from
        the window on that is open after `start_D` tokens."""
        if start_D is not None:
            entry_E = torch.arange(num_entries, device=start_D.device)
            position_DE = (start_D // rate)[:, None] + entry_E
            return rotations(self.inv_freq, position_DE * rate, self.scaling)
        if (rate, num_entries) not in self._rotation_E:
            position_E = torch.arange(num_entries, device=self.inv_freq.device) * rate
            table = rotations(self.inv_freq, position_E, self.scaling)
            self._rotation_E[rate, num_entries] = table
        return self._rotation_E[rate, num_entries]


class GroupedLinear(nn.Module):
    """g independent products: (..., g, in) -> (..., g, out / g), with stock's one weight (out, in).

    Stock's is an nn.Linear by name only, so PEFT's "all-linear" takes it for one and fails; it
    also cannot take a batch without a token."""

    def __init__(self, in_features: int, out_features: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        weight_gio = self.weight.unflatten(0, (self.num_groups, -1)).transpose(1, 2)
        out = torch.bmm(x.reshape(-1, *x.shape[-2:]).transpose(0, 1), weight_gio).transpose(0, 1)
        return out.reshape(*x.shape[:-1], weight_gio.shape[-1])


class V4Attention(stock.DeepseekV4Attention):
    """Stock's parameters over flat tokens and documents."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        out_features, in_features = self.o_a_proj.weight.shape
        self.o_a_proj = GroupedLinear(in_features, out_features, config.o_groups)
        take_own_norms(self)

    def forward(self, x_TH: Tensor, context: Context) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, H) -> (T, H), the indexer's loss attached where it is wanted."""
        documents = context.documents
        rotation = context.rotation_T[self.rope_layer_type].unsqueeze(1)
        latent_TR, q_Thd = project_queries(self, x_TH, rotation)
        kv_Td = rotate(self.kv_norm(self.kv_proj(x_TH)), rotation.squeeze(1))
        kv_Td = rounded_kv(self.config, kv_Td)
        compressed = self._compressed(x_TH, context)
        index = self._index(x_TH, latent_TR, compressed, context)
        attend = tiles.attend
        if use_kernels(x_TH):
            from posttrain.backbone.kernels.attend import attend  # imports triton
        outs: list[Tensor] = []
        losses: list[Tensor] = []
        for group, rows in enumerate(documents.groups):
            window_DJd, num_past = self._window(rows, rows.of(kv_Td), context)
            out, loss = attend(
                rows.of(q_Thd),
                window_DJd,
                compressed[group]["compressor"] if compressed else None,
                self.sinks,
                scale=self.scaling,
                layout=visible.Layout(
                    rows.length_D,
                    rows.start_D,
                    context.longest_start,
                    context.window,
                    num_past,
                    self.compressor.compress_rate if self.compressor is not None else 0,
                ),
                index=index[group] if index else None,
            )
            outs.append(out)
            losses += [loss] if loss is not None else []
        out_TH = project_output(self, documents.merge(outs), rotation)
        if self.compressor is not None and torch.is_grad_enabled():
            has_entries = any(entries["compressor"].shape[1] for entries in compressed)
            idle = self.compressor if not has_entries else getattr(self.compressor, "indexer", None)
            if idle is not None and not losses:
                out_TH = touch(out_TH, idle.parameters())
        if not losses or context.indexer_loss_scale is None:
            return out_TH
        return attach(out_TH, losses, context.indexer_loss_scale / len(x_TH))

    def _window(self, rows: Rows, kv_DLd: Tensor, context: Context) -> tuple[Tensor, int]:
        """The keys of the windows (D, J, d), those of a cache first, and how many these are."""
        if context.cache is None or context.slot_D is None:
            return kv_DLd, 0
        ring = context.cache.window_BWd[self.layer_idx]
        slots, start_D, num_past = context.slot_D[rows.document_D], rows.start_D, 0
        window_DJd = kv_DLd
        if start_D is not None:
            num_past = context.window - 1
            window_DJd = torch.cat([past.before(ring, slots, start_D, num_past), kv_DLd], dim=1)
        start_D = torch.zeros_like(rows.length_D) if start_D is None else start_D
        past.keep(ring, slots, kv_DLd, start_D, rows.length_D)
        return window_DJd, num_past

    def _compressed(self, x_TH: Tensor, context: Context) -> list[dict[str, Tensor]]:
        """For each group its entries by store name: "compressor", and the "indexer"'s keys."""
        if self.compressor is None:
            return []
        modules: dict[str, Any] = {"compressor": self.compressor}
        if hasattr(self.compressor, "indexer") and self._needs_indexer(context):
            modules["indexer"] = self.compressor.indexer
        found: list[dict[str, Tensor]] = [{} for _ in context.documents.groups]
        for name, module in modules.items():
            x = x_TH.detach() if name == "indexer" else x_TH
            kv_TX, gate_TX = module.kv_proj(x), module.gate_proj(x)
            for entries, rows in zip(found, context.documents.groups, strict=True):
                entries[name] = self._compress(
                    name, module, rows, rows.of(kv_TX), rows.of(gate_TX), context
                )
        return found

    def _needs_indexer(self, context: Context) -> bool:
        """Whether some row has more entries than top-k, a loss is wanted, or a cache may grow."""
        module: Any = self.compressor
        most = max((rows.shape[1] for rows in context.documents.groups), default=0)
        return (
            most // module.compress_rate > module.indexer.index_topk
            or context.indexer_loss_scale is not None
            or context.cache is not None
        )

    def _compress(
        self, name: str, module: Any, rows: Rows, kv_DLX: Tensor, gate_DLX: Tensor, context: Context
    ) -> Tensor:
        """All entries of a group's documents (D, E, C), those of a cache in front."""
        rate, cache, slot_D = module.compress_rate, context.cache, context.slot_D
        rounded = rounded_index if name == "indexer" else rounded_kv
        if cache is None or slot_D is None:
            rotation = context.entry_rotation(rate, kv_DLX.shape[1] // rate, None)
            return rounded(self.config, compress(module, kv_DLX, gate_DLX, rotation))
        store, slots = cache.compressed(self.layer_idx, name), slot_D[rows.document_D]
        start_D = torch.zeros_like(rows.length_D) if rows.start_D is None else rows.start_D
        kv, gate = (
            torch.cat([past.before(ring, slots, start_D, store.num_read), new], dim=1)
            for ring, new in ((store.kv_BRX, kv_DLX), (store.gate_BRX, gate_DLX))
        )
        most = past.most_new_entries(start_D, rows.length_D, rate)
        rotation = context.entry_rotation(rate, most, start_D)
        entry_DEC = rounded(self.config, compress_on(module, kv, gate, start_D, rotation))
        past.keep(store.kv_BRX, slots, kv_DLX, start_D, rows.length_D)
        past.keep(store.gate_BRX, slots, gate_DLX, start_D, rows.length_D)
        past.keep_entries(store, slots, entry_DEC, start_D, rows.length_D)
        return store.entry_BEC[slots, : (context.longest_start + kv_DLX.shape[1]) // rate]

    def _index(
        self,
        x_TH: Tensor,
        latent_TR: Tensor,
        compressed: list[dict[str, Tensor]],
        context: Context,
    ) -> list[indexer.Index]:
        """The indexer's view of each group; none where nothing depends on it."""
        module: Any = getattr(self.compressor, "indexer", None)
        if module is None or not all("indexer" in entries for entries in compressed):
            return []
        most = max(entries["indexer"].shape[1] for entries in compressed)
        wants_loss = context.indexer_loss_scale is not None and most > 0
        if most <= module.index_topk and not wants_loss:
            return []  # all of them fit: the scores cannot change the choice
        query = indexer.queries(module, latent_TR.detach(), context.rotation_T["compress"])
        query = rounded_index(self.config, query)
        weight = indexer.head_weights(module, x_TH.detach())
        top_k = most if context.is_indexer_warmup else module.index_topk
        return [
            indexer.Index(rows.of(query), entries["indexer"], rows.of(weight), top_k, wants_loss)
            for rows, entries in zip(context.documents.groups, compressed, strict=True)
        ]


def project_queries(attention: Any, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Query latents (..., q_lora) and rotated queries (..., h, d)."""
    latent = attention.q_a_norm(attention.q_a_proj(x))
    q = attention.q_b_proj(latent).unflatten(-1, (attention.num_heads, attention.head_dim))
    turned: Any = NormAndRotate.apply(q, rotation, attention.q_b_norm.eps)
    return latent, turned


def project_output(attention: Any, out: Tensor, rotation: Tensor) -> Tensor:
    """Heads (..., h, d) -> (..., H): keys are values here, so the rotation is taken back first."""
    grouped = (
        rotate(out, rotation.conj()).flatten(-2).unflatten(-1, (attention.config.o_groups, -1))
    )
    return attention.o_b_proj(attention.o_a_proj(grouped).flatten(-2))
