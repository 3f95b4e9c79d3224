"""One token a slot on the cache: the same attention as in training, its keys read from rings and
stores. Or more tokens, of some slots (chunks.py): all are written before any key is read.

For one token a slot nothing here waits for the device, and with `is_static` no shape depends on a
value, so a step can be compiled whole (compiled.py) or captured: every row takes part in every
write, masked where it has nothing to write, and all the room of the stores is read. Without it the
entries end at the longest row's, and on CPU, where looking costs nothing, only rows that complete
an entry make one.

Legend: T tokens (B where each slot has one), B slots, R ring (W of it the window), E entries, h
heads, d head size, c indexer head size, m compression rate, D tokens that complete an entry, S
tokens that make one, r rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone import indexer
from posttrain.backbone.cache import CompressedStore, V4Cache
from posttrain.backbone.decode_keys import Entries, Part, attend, bias_of, chosen, scores, whole
from posttrain.backbone.decode_norm import normed, projected
from posttrain.backbone.fake_quant import rounded_index, rounded_kv
from posttrain.backbone.routing import RouteTape

T = TypeVar("T")


@dataclass(frozen=True)
class Closing:
    """Rows whose token completes an entry, and what the entry is made of and where it goes."""

    slot_D: Tensor
    place_DS: Tensor
    """Where its tokens' projections stand in the ring's flattened rows of C channels, oldest first:
    where windows overlap, the first series of the previous window's tokens and the second of this
    one's."""
    is_missing_DS1: Tensor
    """True before a row's first token."""
    entry_D: Tensor
    is_complete_D: Tensor | None
    """Rows that really complete one, where `slot_D` are all slots."""
    rotation: Tensor
    """Of each entry, as `DecodeContext.rotation` gives a token's."""


@dataclass(frozen=True)
class DecodeContext:
    """What every layer of one decode step shares."""

    cache: V4Cache
    position_B: Tensor
    rotation_B: dict[str, Tensor]
    """By rope type ("main", "compress"): (B, r/2) complex; where `is_static` (B, r/2, 2), cos and
    sin, since compilers have no complex numbers."""
    inv_freq: Tensor
    """Of the compressed layers' RoPE, for the entries that this step completes."""
    scaling: float
    is_static: bool = False
    """No shape may depend on a value."""
    tape: RouteTape | None = None
    """Takes down the experts that tokens go to, or tells them."""
    parts: tuple[Part, ...] = ()
    """Of the step's tokens; none: one token a slot."""
    slot_of_T: Tensor | None = None
    """Each token's slot, where there are parts."""
    real_X: Tensor | None = None
    """The tokens that the cache is to keep; None: all."""
    reach: int = 0
    """Tokens that the longest row will hold, at least, where there are parts."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """make(), called by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        return cast("T", self._made[key])

    @property
    def slot_T(self) -> Tensor:
        if self.slot_of_T is not None:
            return self.slot_of_T
        return self.once(
            "slots", lambda: torch.arange(len(self.position_B), device=self.position_B.device)
        )

    def put(self, ring_BRX: Tensor, x_TX: Tensor) -> None:
        """Let a ring keep what is of these tokens."""
        real_X, ring = self.real_X, ring_BRX.shape[1]

        def make() -> tuple[Tensor, Tensor]:
            slot_T, place_T = self.slot_T, self.position_B % ring
            return (slot_T, place_T) if real_X is None else (slot_T[real_X], place_T[real_X])

        if real_X is not None and len(real_X) < x_TX.shape[0]:
            x_TX = x_TX.index_select(0, real_X)
        ring_BRX[self.once(("place", ring), make)] = x_TX.to(ring_BRX.dtype)

    def num_keys(self, ring: int) -> int:
        """Places of a window's ring that may hold a token after this step, in whole blocks."""
        return ring if self.is_static else min(ring, whole(self._reach()))

    def num_entries(self, store: CompressedStore) -> int:
        """Entries that may be visible to a row after this step, in whole blocks."""
        room = store.entry_BEC.shape[1]
        return room if self.is_static else min(room, whole(self._reach() // store.rate))

    def window_bias(self, ring: int, window: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, R) of `num_keys`: 0 at keys in the token's window, -inf elsewhere."""

        def make() -> Tensor:
            place_R = torch.arange(self.num_keys(ring), device=self.position_B.device)
            age_BR = (self.position_B[:, None] - place_R) % ring
            return bias_of((age_BR >= window) | (age_BR > self.position_B[:, None]), dtype)

        return self.once(("window", ring, window, dtype), make)

    def is_hidden(self, rate: int, num_entries: int) -> Tensor:
        """(B, E): entries of windows that this token does not complete, nor one before it."""

        def make() -> Tensor:
            device = self.position_B.device
            entry_E = torch.arange(num_entries, dtype=torch.int32, device=device)
            return entry_E >= ((self.position_B + 1) // rate).to(torch.int32)[:, None]

        return self.once(("hidden", rate, num_entries), make)

    def entry_bias(self, rate: int, num_entries: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, E): 0 at the entries that the token sees, -inf elsewhere."""
        return self.once(
            ("entries", rate, num_entries, dtype),
            lambda: bias_of(self.is_hidden(rate, num_entries), dtype),
        )

    def closing(self, store: CompressedStore) -> Closing | None:
        """None: no row completes an entry."""
        key = ("closing", store.rate, store.num_read, store.kv_BRX.shape[1])
        return self.once(key, lambda: self._closing(store))

    def _closing(self, store: CompressedStore) -> Closing | None:
        rate, device = store.rate, self.position_B.device
        self.num_entries(store)  # makes room for this token where shapes may change
        if not store.entry_BEC.shape[1]:
            return None
        is_complete_B: Tensor | None = (self.position_B + 1) % rate == 0
        row_D = torch.arange(len(is_complete_B), device=device)
        if self.real_X is not None:
            row_D, is_complete_B = self.real_X[is_complete_B[self.real_X]], None
        elif not self.is_static and self.cache.is_on_host:
            row_D, is_complete_B = is_complete_B.nonzero().squeeze(1), None
        if is_complete_B is None and not len(row_D):
            return None
        last_D, ring = self.position_B[row_D], store.kv_BRX.shape[1]
        token_DS = last_D[:, None] + torch.arange(1 - store.num_read, 1, device=device)
        slot_D = self.slot_T[row_D]
        place_DS = slot_D[:, None] * ring + token_DS % ring
        if store.is_overlapping:
            place_DS = 2 * place_DS + torch.arange(store.num_read, device=device) // rate
        return Closing(
            slot_D,
            place_DS,
            (token_DS < 0).unsqueeze(-1),
            ((last_D + 1) // rate - 1).clamp(min=0),
            is_complete_B,
            rotations(self.inv_freq, last_D + 1 - rate, self.scaling, is_real=self.is_static),
        )

    def _reach(self) -> int:
        """Tokens that the longest row holds after this step; the cache has room for them then."""

        def make() -> int:
            reach = self.reach if self.parts else self.cache.longest() + 1
            self.cache.reserve(reach)
            return reach

        return self.once("reach", make)


def context_of(
    model: Any,
    cache: V4Cache,
    *,
    is_static: bool = False,
    tape: RouteTape | None = None,
    position_T: Tensor | None = None,
    **told: Any,
) -> DecodeContext:
    """The context of one more token in every slot, or of others, at `position_T`, of which `told`
    says more; `model` is a V4Model."""
    rope = model.rotary_emb
    position_T = cache.length_B if position_T is None else position_T

    def turn(name: str) -> Tensor:
        inv_freq = getattr(rope, f"{name}_inv_freq")
        scaling = getattr(rope, f"{name}_attention_scaling")
        return rotations(inv_freq, position_T, scaling, is_real=is_static)

    return DecodeContext(
        cache,
        position_T,
        {name: turn(name) for name in ("main", "compress")},
        rope.compress_inv_freq,
        rope.compress_attention_scaling,
        is_static,
        tape,
        **told,
    )


def rotations(inv_freq: Tensor, position_B: Tensor, scaling: float, *, is_real: bool) -> Tensor:
    """(B, r/2) complex64, or its cos and sin (B, r/2, 2) float32."""
    angle = position_B[:, None].float() * inv_freq.to(position_B.device, torch.float32)
    if is_real:
        return torch.stack([angle.cos(), angle.sin()], dim=-1) * scaling
    return torch.polar(torch.full_like(angle, scaling), angle)


def rotate(x: Tensor, rotation: Tensor, *, back: bool = False) -> Tensor:
    """Turn the last channels of x (B, channels) or (B, h, channels), in place; `back` takes it
    back."""
    width = 2 * rotation.shape[1]
    part = x.narrow(-1, x.shape[-1] - width, width)
    rotation = rotation if x.dim() == 2 else rotation.unsqueeze(1)
    if not rotation.is_complex():
        pairs = part.float().unflatten(-1, (-1, 2))
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        sin = -sin if back else sin
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        part.copy_(pairs.flatten(-2))
        return x
    pairs = part.float().view(*x.shape[:-1], -1, 2)
    torch.view_as_complex(pairs).mul_(rotation.conj() if back else rotation)
    if x.dtype != torch.float32:  # else `pairs` is x
        part.copy_(pairs.flatten(-2))
    return x


def decode_attention(attention: Any, x_BH: Tensor, context: DecodeContext) -> Tensor:
    """(B, H) -> (B, H): write this token's key, then attend to what the slot holds."""
    cache, rotation = context.cache, context.rotation_B[attention.rope_layer_type]
    latent_BR = normed(attention.q_a_norm, projected(attention.q_a_proj, x_BH))
    q_Bhd = projected(attention.q_b_proj, latent_BR).view(len(x_BH), -1, attention.head_dim)
    q_Bhd = rotate(normed(attention.q_b_norm, q_Bhd), rotation)
    ring_BRd = cache.window_BWd[attention.layer_idx]
    kv_Bd = rotate(normed(attention.kv_norm, projected(attention.kv_proj, x_BH)), rotation)
    kv_Bd = rounded_kv(attention.config, kv_Bd)
    context.put(ring_BRd, kv_Bd)
    ring = ring_BRd.shape[1]
    window_bias = context.window_bias(ring, cache.window, q_Bhd.dtype)
    window_BRd = ring_BRd[:, : context.num_keys(ring)]
    entry: Entries | None = None
    if attention.compressor is not None:
        entry = _entries(attention, x_BH, latent_BR, context)
    outs = [
        attend(
            q_Bhd[part.first : part.end],
            [
                (part.of(window_BRd), window_bias[part.first : part.end]),
                *([entry.of(part)] if entry is not None else []),
            ],
            attention.sinks,
            attention.scaling,
        )
        for part in context.parts or (Part(0, len(q_Bhd)),)
    ]
    out_Bhd = rotate(outs[0] if len(outs) == 1 else torch.cat(outs), rotation, back=True)
    grouped = out_Bhd.flatten(1).unflatten(-1, (attention.config.o_groups, -1))
    return projected(attention.o_b_proj, attention.o_a_proj(grouped).flatten(1))


def _entries(
    attention: Any, x_BH: Tensor, latent_BR: Tensor, context: DecodeContext
) -> Entries | None:
    """None while no window is complete."""
    compressor = attention.compressor
    store = context.cache.compressed(attention.layer_idx, "compressor")
    append(store, compressor, x_BH, context, partial(rounded_kv, attention.config))
    num_entries = context.num_entries(store)
    if hasattr(compressor, "indexer"):
        keys = context.cache.compressed(attention.layer_idx, "indexer")
        append(keys, compressor.indexer, x_BH, context, partial(rounded_index, attention.config))
        if num_entries > compressor.indexer.index_topk:
            q_Thc = index_queries(compressor.indexer, latent_BR, context)
            q_Thc = rounded_index(attention.config, q_Thc)
            weight_Th = indexer.head_weights(compressor.indexer, x_BH)
            score_TE = scores(q_Thc, keys.entry_BEC[:, :num_entries], weight_Th, context.parts)
            is_hidden_TE = context.is_hidden(store.rate, num_entries)
            return chosen(
                score_TE, store, context.slot_T, is_hidden_TE, compressor.indexer.index_topk
            )
    if not num_entries:
        return None
    bias_T1E = context.entry_bias(store.rate, num_entries, x_BH.dtype)
    return Entries(store.entry_BEC[:, :num_entries], bias_T1E, is_own=False)


def index_queries(module: Any, latent_BR: Tensor, context: DecodeContext) -> Tensor:
    """The indexer's queries (B, h, c), rotated."""
    q_Bhc = module.q_b_proj(latent_BR).unflatten(-1, (module.num_heads, module.head_dim))
    return rotate(q_Bhc, context.rotation_B["compress"])


def append(
    store: CompressedStore,
    module: Any,
    x_BH: Tensor,
    context: DecodeContext,
    rounded: Callable[[Tensor], Tensor],
) -> None:
    """Remember this token's projections; rows whose window it closes get their entry, `rounded`
    as serving does."""
    context.put(store.kv_BRX, projected(module.kv_proj, x_BH))
    context.put(store.gate_BRX, projected(module.gate_proj, x_BH))
    closing = context.closing(store)
    if closing is None:
        return
    slot_D, bias = closing.slot_D, module.position_bias
    width = store.entry_BEC.shape[-1]
    kv, gate = (
        F.embedding(closing.place_DS, ring_BRX.view(-1, width)).float()
        for ring_BRX in (store.kv_BRX, store.gate_BRX)
    )
    if store.is_overlapping:
        bias = torch.cat(bias.chunk(2, dim=-1))
    # a row's last token is always real, so no softmax is over nothing
    gate = (gate + bias).masked_fill(closing.is_missing_DS1, float("-inf"))
    entry_DC = normed(module.kv_norm, (kv * gate.softmax(dim=1)).sum(dim=1))
    entry_DC = rounded(rotate(entry_DC, closing.rotation)).to(store.entry_BEC.dtype)
    if closing.is_complete_D is not None:
        old_DC = store.entry_BEC[slot_D, closing.entry_D]
        entry_DC = torch.where(closing.is_complete_D[:, None], entry_DC, old_DC)
    store.entry_BEC[slot_D, closing.entry_D] = entry_DC
