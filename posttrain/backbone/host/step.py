"""All layers over the tokens of one decode step, in loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import DecodeContext
from posttrain.backbone.host import arrays, loop
from posttrain.backbone.host.arrays import (
    NO_STORE,
    NONE_I2,
    Attention,
    Choices,
    Compressor,
    Connection,
    Experts,
    Store,
    Tokens,
    array,
)
from posttrain.backbone.host.attention import attend
from posttrain.backbone.host.experts import mix
from posttrain.backbone.host.hyper import read, read_last, write
from posttrain.backbone.host.sums import F32, I64
from posttrain.backbone.host.threads import even, spread
from posttrain.backbone.host.weights import Weights
from posttrain.backbone.routing import Routes, RouteTape, told


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
    x_TX = np.tile(array(embeds_TH), model.config.hc_mult)
    out_TH = torch.empty_like(embeds_TH)
    out = array(out_TH)
    steps: list[tuple[Any, ...]] = []
    for layer, own, held in zip(model.layers, weights.layers, past, strict=True):
        steps.append(
            (
                turns[layer.self_attn.rope_layer_type],
                *own,
                *held,
                weights.inv_freq_r,
                scaling,
                *_choices(layer.mlp, token_id_T, tape),
            )
        )

    def work(first: int, end: int) -> None:
        for step in steps:
            _layer(first, end, x_TX, tokens, *step)
        read_last(x_TX[first:end], weights.head, out[first:end])

    spread(work, ends)
    if tape:
        for layer, step in zip(model.layers, steps, strict=True):
            _record(tape, layer.mlp, step[-1])
    return out_TH


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
        found.append((array(ring_BRd), entries, keys))
    return found


def _choices(block: Any, token_id_T: Tensor, tape: RouteTape | None) -> tuple[I64, Choices]:
    """The experts that the layer is told, and room for what its router gives."""
    gate, replay_Tk = block.gate, tape.replay(block.layer_idx) if tape else None
    num = len(token_id_T)
    told_Tk = told(gate, token_id_T, num, is_hash=block.is_hash, replay_Tk=replay_Tk)
    choices = arrays.choices(num, len(gate.weight), gate.top_k)
    return NONE_I2 if told_Tk is None else array(told_Tk), choices


def _record(tape: RouteTape, block: Any, choices: Choices) -> None:
    score_TE, expert_Tk, weight_Tk = (torch.from_numpy(x) for x in choices)
    routes = Routes(expert_Tk, weight_Tk, score_TE)
    tape.record(block.layer_idx, block.gate, routes, is_hash=block.is_hash)


@loop
def _layer(
    first: int,
    end: int,
    all_TX: F32,
    all_tokens: Tokens,
    all_TrZ: F32,
    attn_hc: Connection,
    attention: Attention,
    compressor: Compressor,
    index: Compressor,
    ffn_hc: Connection,
    experts: Experts,
    ring_BRd: F32,
    entries: Store,
    keys: Store,
    inv_freq_r: F32,
    freq_scaling: float,
    told_Tk: I64,
    choices: Choices,
) -> None:
    """A layer over the streams of the tokens from `first` to `end`, in place: V4DecoderLayer's
    steps."""
    x_TX, turn_TrZ, told_Tk = all_TX[first:end], all_TrZ[first:end], told_Tk[first:end]
    slot_T, position_T, is_real_T = all_tokens
    tokens = Tokens(slot_T[first:end], position_T[first:end], is_real_T[first:end])
    score_TE, expert_Tk, weight_Tk = choices
    choices = Choices(score_TE[first:end], expert_Tk[first:end], weight_Tk[first:end])
    num_tokens, size = len(x_TX), len(attn_hc.weight_H)
    num = x_TX.shape[1] // size
    read_TH, given_TH = (
        np.empty((num_tokens, size), np.float32),
        np.empty((num_tokens, size), np.float32),
    )
    post_TN = np.empty((num_tokens, num), np.float32)
    comb_TNN = np.empty((num_tokens, num, num), np.float32)
    read(x_TX, attn_hc, read_TH, post_TN, comb_TNN)
    attend(
        read_TH,
        tokens,
        turn_TrZ,
        attention,
        ring_BRd,
        compressor,
        entries,
        index,
        keys,
        inv_freq_r,
        freq_scaling,
        given_TH,
    )
    write(x_TX, given_TH, post_TN, comb_TNN)
    read(x_TX, ffn_hc, read_TH, post_TN, comb_TNN)
    mix(read_TH, experts, told_Tk, tokens.is_real_T, choices, given_TH)
    write(x_TX, given_TH, post_TN, comb_TNN)


def _tokens(context: DecodeContext) -> Tokens:
    is_real_T = np.full(len(context.position_B), context.real_X is None)
    if context.real_X is not None:
        is_real_T[context.real_X.numpy()] = True
    return Tokens(array(context.slot_T), array(context.position_B), is_real_T)
