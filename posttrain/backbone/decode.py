"""One token a slot on the cache: the same attention as in training, its keys read from rings and
stores.

Nothing here waits for the device, and with `is_static` no shape depends on a value, so a step can
be compiled whole (compiled.py) or captured: every row takes part in every write, masked where
it has nothing to write, and all the room of the stores is read. Without it the entries end at the
longest row's, and on CPU, where looking costs nothing, only rows that complete an entry make one.

Legend: B slots, R ring (W of it the window), E entries, K chosen ones, h heads, d head size, c
indexer head size, m compression rate, D rows that complete an entry, S tokens that make one, r
rotated channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone import indexer
from posttrain.backbone.cache import CompressedStore, V4Cache
from posttrain.backbone.fake_quant import rounded_index, rounded_kv
from posttrain.backbone.routing import RouteTape
from posttrain.backbone.visible import GATHER

T = TypeVar("T")

SCORES_AT_ONCE = 1 << 18
"""Indexer scores of single heads that are in memory at a time: they stay in a CPU's cache."""


@dataclass(frozen=True)
class Closing:
    """Rows whose token completes an entry, and what the entry is made of and where it goes."""

    row_D: Tensor
    place_DS: Tensor
    """Where its tokens' projections stand in the ring's flattened rows of C channels, oldest first:
    where windows overlap, the first series of the previous window's tokens and the second of this
    one's."""
    is_missing_DS1: Tensor
    """True before a row's first token."""
    entry_D: Tensor
    is_complete_D: Tensor | None
    """Rows that really complete one, where `row_D` are all rows."""
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
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """make(), called by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        return cast("T", self._made[key])

    @property
    def row_B(self) -> Tensor:
        return self.once(
            "rows", lambda: torch.arange(len(self.position_B), device=self.position_B.device)
        )

    def place_B(self, ring: int) -> Tensor:
        """Where a ring takes this token."""
        return self.once(("place", ring), lambda: self.position_B % ring)

    def num_entries(self, store: CompressedStore) -> int:
        """Entries that may be visible to a row after this token."""
        room = store.entry_BEC.shape[1]
        return room if self.is_static else min(room, (self._longest() + 1) // store.rate)

    def window_bias(self, ring: int, window: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, R): 0 at keys in the token's window, -inf elsewhere."""

        def make() -> Tensor:
            place_R = torch.arange(ring, device=self.position_B.device)
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
        row_D = self.row_B
        if not self.is_static and self.cache.is_on_host:
            row_D, is_complete_B = is_complete_B.nonzero().squeeze(1), None
            if not len(row_D):
                return None
        last_D, ring = self.position_B[row_D], store.kv_BRX.shape[1]
        token_DS = last_D[:, None] + torch.arange(1 - store.num_read, 1, device=device)
        place_DS = row_D[:, None] * ring + token_DS % ring
        if store.is_overlapping:
            place_DS = 2 * place_DS + torch.arange(store.num_read, device=device) // rate
        return Closing(
            row_D,
            place_DS,
            (token_DS < 0).unsqueeze(-1),
            ((last_D + 1) // rate - 1).clamp(min=0),
            is_complete_B,
            rotations(self.inv_freq, last_D + 1 - rate, self.scaling, is_real=self.is_static),
        )

    def _longest(self) -> int:
        def make() -> int:
            longest = self.cache.longest()
            self.cache.reserve(longest + 1)
            return longest

        return self.once("longest", make)


def context_of(
    model: Any, cache: V4Cache, *, is_static: bool = False, tape: RouteTape | None = None
) -> DecodeContext:
    """The context of one more token in every slot; `model` is a V4Model."""
    rope = model.rotary_emb

    def turn(name: str) -> Tensor:
        inv_freq = getattr(rope, f"{name}_inv_freq")
        scaling = getattr(rope, f"{name}_attention_scaling")
        return rotations(inv_freq, cache.length_B, scaling, is_real=is_static)

    return DecodeContext(
        cache,
        cache.length_B,
        {name: turn(name) for name in ("main", "compress")},
        rope.compress_inv_freq,
        rope.compress_attention_scaling,
        is_static,
        tape,
    )


def rotations(inv_freq: Tensor, position_B: Tensor, scaling: float, *, is_real: bool) -> Tensor:
    """(B, r/2) complex64, or its cos and sin (B, r/2, 2) float32."""
    angle = position_B[:, None].float() * inv_freq.to(position_B.device, torch.float32)
    if is_real:
        return torch.stack([angle.cos(), angle.sin()], dim=-1) * scaling
    return torch.polar(torch.full_like(angle, scaling), angle)


def rotate(x: Tensor, rotation: Tensor, *, back: bool = False) -> Tensor:
    """Turn the last channels of x (B, ..., channels), in place; `back` takes it back."""
    width = 2 * rotation.shape[1]
    part = x[..., x.shape[-1] - width :]
    pairs = part.float().unflatten(-1, (-1, 2))
    rotation = rotation.view(len(x), *(1,) * (x.dim() - 2), *rotation.shape[1:])
    if rotation.is_complex():
        torch.view_as_complex(pairs).mul_(rotation.conj() if back else rotation)
        if part.dtype == torch.float32:
            return x  # `pairs` is x
    else:
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        sin = -sin if back else sin
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    part.copy_(pairs.flatten(-2))
    return x


def bias_of(is_hidden_BK: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where hidden, 0 elsewhere, (B, 1, K)."""
    bias = torch.zeros_like(is_hidden_BK, dtype=dtype)
    return bias.masked_fill_(is_hidden_BK, float("-inf")).unsqueeze(1)


def decode_attention(attention: Any, x_BH: Tensor, context: DecodeContext) -> Tensor:
    """(B, H) -> (B, H): write this token's key, then attend to what the slot holds."""
    cache, rotation = context.cache, context.rotation_B[attention.rope_layer_type]
    latent_BR = attention.q_a_norm(attention.q_a_proj(x_BH))
    q_Bhd = attention.q_b_proj(latent_BR).unflatten(-1, (attention.num_heads, attention.head_dim))
    q_Bhd = rotate(attention.q_b_norm(q_Bhd), rotation)
    ring_BRd = cache.window_BWd[attention.layer_idx]
    kv_Bd = rotate(attention.kv_norm(attention.kv_proj(x_BH)), rotation)
    kv_Bd = rounded_kv(attention.config, kv_Bd)
    ring_BRd[context.row_B, context.place_B(ring_BRd.shape[1])] = kv_Bd.to(ring_BRd.dtype)
    keys = [(ring_BRd, context.window_bias(ring_BRd.shape[1], cache.window, q_Bhd.dtype))]
    if attention.compressor is not None:
        keys += _entries(attention, x_BH, latent_BR, context)
    out_Bhd = rotate(attend(q_Bhd, keys, attention.sinks, attention.scaling), rotation, back=True)
    grouped = out_Bhd.flatten(1).unflatten(-1, (attention.config.o_groups, -1))
    return attention.o_b_proj(attention.o_a_proj(grouped).flatten(1))


def attend(
    q_Bhd: Tensor, keys: list[tuple[Tensor, Tensor]], sink_h: Tensor, scale: float
) -> Tensor:
    """(B, h, d): one softmax over all sets of keys (B, K, d), each with its bias (B, 1, K), and
    the sink; the keys are the values. Logits are put side by side, keys never."""
    logits = [torch.baddbmm(bias, q_Bhd, k.transpose(1, 2), alpha=scale) for k, bias in keys]
    sink = sink_h.to(q_Bhd.dtype).view(1, -1, 1).expand(len(q_Bhd), -1, 1)
    weights = torch.cat([*logits, sink], dim=-1).softmax(dim=-1, dtype=torch.float32)
    shares = weights.to(q_Bhd.dtype).split([*(k.shape[1] for k, _ in keys), 1], dim=-1)
    out_Bhd = torch.bmm(shares[0], keys[0][0])
    for share, (k, _) in zip(shares[1:-1], keys[1:], strict=True):
        out_Bhd = torch.baddbmm(out_Bhd, share, k)
    return out_Bhd


def _entries(
    attention: Any, x_BH: Tensor, latent_BR: Tensor, context: DecodeContext
) -> list[tuple[Tensor, Tensor]]:
    """The entries that the new token attends to (B, K, d), with their bias (B, 1, K); none while
    no window is complete."""
    compressor = attention.compressor
    store = context.cache.compressed(attention.layer_idx, "compressor")
    append(store, compressor, x_BH, context, partial(rounded_kv, attention.config))
    num_entries = context.num_entries(store)
    entry_BEd = store.entry_BEC[:, :num_entries]
    if hasattr(compressor, "indexer"):
        keys = context.cache.compressed(attention.layer_idx, "indexer")
        append(keys, compressor.indexer, x_BH, context, partial(rounded_index, attention.config))
        if num_entries > compressor.indexer.index_topk:
            key_BEc = keys.entry_BEC[:, :num_entries]
            q_Bhc = index_queries(compressor.indexer, latent_BR, context)
            q_Bhc = rounded_index(attention.config, q_Bhc)
            score_BE = scores(q_Bhc, key_BEc, indexer.head_weights(compressor.indexer, x_BH))
            is_hidden_BE = context.is_hidden(store.rate, num_entries)
            return [chosen(score_BE, entry_BEd, is_hidden_BE, compressor.indexer.index_topk)]
    bias_B1E = context.entry_bias(store.rate, num_entries, x_BH.dtype)
    return [(entry_BEd, bias_B1E)] if num_entries else []


def index_queries(module: Any, latent_BR: Tensor, context: DecodeContext) -> Tensor:
    """The indexer's queries (B, h, c), rotated."""
    q_Bhc = module.q_b_proj(latent_BR).unflatten(-1, (module.num_heads, module.head_dim))
    return rotate(q_Bhc, context.rotation_B["compress"])


def chosen(
    score_BE: Tensor, entry_BEd: Tensor, is_hidden_BE: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    """The `top_k` best entries that are not hidden, with their bias: all under a mask, or where
    there are many, gathered (B, K, d)."""
    score_BE = score_BE.masked_fill_(is_hidden_BE, float("-inf"))
    if score_BE.shape[1] <= GATHER * top_k:
        is_chosen_BE = indexer.top_k_mask(score_BE, top_k)
        return entry_BEd, bias_of(~is_chosen_BE | is_hidden_BE, entry_BEd.dtype)
    index_BK = best(score_BE, top_k)
    row_B1 = torch.arange(len(score_BE), device=score_BE.device)[:, None]
    return entry_BEd[row_B1, index_BK], bias_of(is_hidden_BE.gather(1, index_BK), entry_BEd.dtype)


def scores(q_Bhc: Tensor, key_BEc: Tensor, weight_Bh: Tensor) -> Tensor:
    """sum_h w[h] relu(q[h] . k[e]), (B, E) in float32 (V4 report eq. 16)."""
    batch, heads, _ = q_Bhc.shape
    q_Bch = q_Bhc.to(weight_Bh.dtype).transpose(1, 2)
    weight_Bh1 = weight_Bh.unsqueeze(2)
    block = max(1024, SCORES_AT_ONCE // max(batch * heads, 1))
    parts = [
        torch.bmm(torch.bmm(keys.to(weight_Bh.dtype), q_Bch).relu_(), weight_Bh1).squeeze(2)
        for keys in key_BEc.split(block, dim=1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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


def append(
    store: CompressedStore,
    module: Any,
    x_BH: Tensor,
    context: DecodeContext,
    rounded: Callable[[Tensor], Tensor],
) -> None:
    """Remember this token's projections; rows whose window it closes get their entry, `rounded`
    as serving does."""
    place_B = context.place_B(store.kv_BRX.shape[1])
    store.kv_BRX[context.row_B, place_B] = module.kv_proj(x_BH).to(store.kv_BRX.dtype)
    store.gate_BRX[context.row_B, place_B] = module.gate_proj(x_BH).to(store.kv_BRX.dtype)
    closing = context.closing(store)
    if closing is None:
        return
    row_D, bias = closing.row_D, module.position_bias
    width = store.entry_BEC.shape[-1]
    kv, gate = (
        F.embedding(closing.place_DS, ring_BRX.view(-1, width)).float()
        for ring_BRX in (store.kv_BRX, store.gate_BRX)
    )
    if store.is_overlapping:
        bias = torch.cat(bias.chunk(2, dim=-1))
    # a row's last token is always real, so no softmax is over nothing
    gate = (gate + bias).masked_fill(closing.is_missing_DS1, float("-inf"))
    entry_DC = module.kv_norm((kv * gate.softmax(dim=1)).sum(dim=1))
    entry_DC = rounded(rotate(entry_DC, closing.rotation)).to(store.entry_BEC.dtype)
    if closing.is_complete_D is not None:
        old_DC = store.entry_BEC[row_D, closing.entry_D]
        entry_DC = torch.where(closing.is_complete_D[:, None], entry_DC, old_DC)
    store.entry_BEC[row_D, closing.entry_D] = entry_DC
