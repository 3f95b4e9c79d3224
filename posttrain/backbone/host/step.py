"""All layers over the tokens of one decode step, in loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import DecodeContext
from posttrain.backbone.host import arrays
from posttrain.backbone.host.arrays import (
    NO_STORE,
    NONE_F2,
    NONE_F3,
    NONE_I2,
    Choices,
    Store,
    Tokens,
)
from posttrain.backbone.host.attention import attention
from posttrain.backbone.host.experts import mix
from posttrain.backbone.host.streams import read_step, write
from posttrain.backbone.host.sums import F32, I64
from posttrain.backbone.host.threads import even, spread
from posttrain.backbone.host.weights import LayerWeights, Weights
from posttrain.backbone.routing import Routes, RouteTape, told


class Step(NamedTuple):
    """What a layer works with."""

    own: LayerWeights
    turn_TrZ: F32
    ring_BRd: F32
    entries: Store
    keys: Store
    told_Tk: I64
    choices: Choices


def run_step(model: Any, weights: Weights, token_id_T: Tensor, context: DecodeContext) -> Tensor:
    """Hidden states (T, H), normalised, of a V4Model's step."""
    for stores in context.cache.stores:
        for store in stores.values():
            context.num_entries(store)  # makes room for the step's entries
    return run_layers(
        model,
        weights,
        token_id_T,
        _tokens(context),
        {name: arrays.turns(rotation) for name, rotation in context.rotation_B.items()},
        past_of(context.cache),
        scaling=context.scaling,
        ends=_ends(context, weights.size),
        tape=context.tape,
    )


def run_layers(
    model: Any,
    weights: Weights,
    token_id_T: Tensor,
    tokens: Tokens,
    turns: dict[str, F32],
    past: Sequence[tuple[F32, Store, Store]],
    *,
    scaling: float,
    ends: Sequence[int],
    tape: RouteTape | None,
) -> Tensor:
    """Hidden states (T, H), normalised, of tokens at the places that `turns` are of; `past` has
    room for their entries. Each of `ends` is where a thread's part of the tokens does."""
    embeds_TH = model.embed_tokens(token_id_T)
    x_TNH = np.tile(embeds_TH.numpy()[:, None], (1, model.config.hc_mult, 1))
    out_TH = torch.empty_like(embeds_TH)
    out, head = out_TH.numpy(), weights.head
    steps = [
        Step(
            own,
            turns[layer.self_attn.rope_layer_type],
            *held,
            *_choices(layer.mlp, token_id_T, tape),
        )
        for layer, own, held in zip(model.layers, weights.layers, past, strict=True)
    ]

    def work(first: int, end: int) -> None:
        part = slice(first, end)
        last_TNH = _layers(part, x_TNH[part], tokens, steps, (weights.inv_freq_r, scaling))
        read_step(last_TNH, head, out[part], NONE_F2, NONE_F3)

    spread(work, ends)
    if tape:
        for layer, step in zip(model.layers, steps, strict=True):
            _record(tape, layer.mlp, step.choices)
    return out_TH


def _layers(
    part: slice, x_TNH: F32, tokens: Tokens, steps: Sequence[Step], rope: tuple[F32, float]
) -> F32:
    """The streams of these tokens after all layers: V4DecoderLayer's steps. Spends x."""
    num_tokens, num, size = x_TNH.shape
    read_TH = np.empty((num_tokens, size), np.float32)
    given_TH, new_TNH = np.empty_like(read_TH), np.empty_like(x_TNH)
    post_TN = np.empty((num_tokens, num), np.float32)
    comb_TNN = np.empty((num_tokens, num, num), np.float32)
    tokens = Tokens(tokens.slot_T[part], tokens.position_T[part], tokens.is_real_T[part])
    for step in steps:
        own, (score_TE, expert_Tk, weight_Tk) = step.own, step.choices
        choices = Choices(score_TE[part], expert_Tk[part], weight_Tk[part])
        read_step(x_TNH, own.attn_hc, read_TH, post_TN, comb_TNN)
        attention(
            read_TH,
            tokens,
            step.turn_TrZ[part],
            own.attention,
            step.ring_BRd,
            own.compressor,
            step.entries,
            own.index_keys,
            step.keys,
            *rope,
            given_TH,
        )
        write(0, num_tokens, x_TNH, given_TH, post_TN, comb_TNN, new_TNH)
        read_step(new_TNH, own.ffn_hc, read_TH, post_TN, comb_TNN)
        mix(read_TH, own.experts, step.told_Tk[part], tokens.is_real_T, choices, given_TH)
        write(0, num_tokens, new_TNH, given_TH, post_TN, comb_TNN, x_TNH)
    return x_TNH


def _ends(context: DecodeContext, row_size: int) -> list[int]:
    """Where the threads' parts of the tokens end: a chunk's row is one thread's, for its tokens see
    each other."""
    total, last = len(context.position_B), context.parts[-1] if context.parts else None
    if last is None or last.slot_D is None:
        return even(total, row_size)
    columns = (last.end - last.first) // len(last.slot_D)
    ends = [
        end if end <= last.first else last.first + (end - last.first) // columns * columns
        for end in even(total, row_size)
    ]
    return sorted(set(ends))


def past_of(cache: V4Cache) -> list[tuple[F32, Store, Store]]:
    """What each layer's cache holds: the window ring, the compressor's entries, the indexer's."""
    found: list[tuple[F32, Store, Store]] = []
    for ring_BRd, own in zip(cache.window_BWd, cache.stores, strict=True):
        stores = {name: arrays.store(store) for name, store in own.items()}
        entries, keys = (stores.get(name, NO_STORE) for name in ("compressor", "indexer"))
        found.append((ring_BRd.numpy(), entries, keys))
    return found


def _choices(block: Any, token_id_T: Tensor, tape: RouteTape | None) -> tuple[I64, Choices]:
    """The experts that the layer is told, and room for what its router gives.

    Raises IndexError: it is told of an expert that there is not."""
    gate, replay_Tk = block.gate, tape.replay(block.layer_idx) if tape else None
    num = len(token_id_T)
    told_Tk = told(gate, token_id_T, num, is_hash=block.is_hash, replay_Tk=replay_Tk)
    choices = arrays.choices(num, len(gate.weight), gate.top_k)
    if told_Tk is None:
        return NONE_I2, choices
    found_Tk = told_Tk.contiguous().numpy()
    if (last := found_Tk.max(initial=-1)) >= len(gate.weight):
        raise IndexError(
            f"layer {block.layer_idx} is told to use expert {last}, but has {len(gate.weight)}: "
            "its hash table or the replayed routes are another model's"
        )
    return found_Tk, choices


def _record(tape: RouteTape, block: Any, choices: Choices) -> None:
    score_TE, expert_Tk, weight_Tk = (torch.from_numpy(x) for x in choices)
    routes = Routes(expert_Tk, weight_Tk, score_TE)
    tape.record(block.layer_idx, block.gate, routes, is_hash=block.is_hash)


def _tokens(context: DecodeContext) -> Tokens:
    is_real_T = np.full(len(context.position_B), context.real_X is None)
    if context.real_X is not None:
        is_real_T[context.real_X.numpy()] = True
    return Tokens(context.slot_T.numpy(), context.position_B.numpy(), is_real_T)
