"""All layers over the tokens of one decode step, in loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from posttrain.backbone.host.numbers import F32, I64
from posttrain.backbone.host.weights import Weights
from posttrain.backbone.routing import Routes, RouteTape, told


def run_step(model: Any, weights: Weights, token_id_T: Tensor, context: DecodeContext) -> Tensor:
    """Hidden states (T, H), normalised, of a V4Model's step."""
    embeds_TH = model.embed_tokens(token_id_T)
    x_TX = array(embeds_TH.repeat(1, model.config.hc_mult))
    tokens = _tokens(context)
    turns = {name: arrays.turns(rotation) for name, rotation in context.rotation_B.items()}
    for layer, own in zip(model.layers, weights.layers, strict=True):
        turn_TrZ = turns[layer.self_attn.rope_layer_type]
        choices, told_Tk = _choices(layer.mlp, token_id_T, context.tape)
        _layer(
            x_TX,
            tokens,
            turn_TrZ,
            *own,
            *_past(layer, context),
            weights.inv_freq_r,
            context.scaling,
            told_Tk,
            choices,
        )
        if context.tape:
            _record(context.tape, layer.mlp, choices)
    out_TH = torch.empty_like(embeds_TH)
    read_last(x_TX, weights.head, array(out_TH))
    return out_TH


def _past(layer: Any, context: DecodeContext) -> tuple[F32, Store, Store]:
    """What the layer's cache holds, with room for the step's entries: the window ring, the
    compressor's entries, the indexer's."""
    cache, index = context.cache, layer.layer_idx
    for store in cache.stores[index].values():
        context.num_entries(store)
    stores = {name: arrays.store(store) for name, store in cache.stores[index].items()}
    ring_BRd = array(cache.window_BWd[index])
    return ring_BRd, stores.get("compressor", NO_STORE), stores.get("indexer", NO_STORE)


def _choices(
    block: Any, token_id_T: Tensor, tape: RouteTape | None
) -> tuple[Choices, I64]:
    """Room for what the layer's router gives, and the experts that it is told."""
    gate, replay_Tk = block.gate, tape.replay(block.layer_idx) if tape else None
    num = len(token_id_T)
    told_Tk = told(gate, token_id_T, num, is_hash=block.is_hash, replay_Tk=replay_Tk)
    choices = arrays.choices(num, len(gate.weight), gate.top_k)
    return choices, NONE_I2 if told_Tk is None else array(told_Tk)


def _record(tape: RouteTape, block: Any, choices: Choices) -> None:
    score_TE, expert_Tk, weight_Tk = (torch.from_numpy(x) for x in choices)
    routes = Routes(expert_Tk, weight_Tk, score_TE)
    tape.record(block.layer_idx, block.gate, routes, is_hash=block.is_hash)


@loop
def _layer(
    x_TX: F32,
    tokens: Tokens,
    turn_TrZ: F32,
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
    """A layer over the streams, in place: V4DecoderLayer's steps."""
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
