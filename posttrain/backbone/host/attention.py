"""The attention of one decode step (decode.py, decode_keys.py, against which it is tested): each
token attends to its slot's window ring, the entries that it sees, and the sink.

Legend: T tokens, B slots, R ring, E entries, K keys, h heads, d head size, r rotated pairs, C
channels of an entry, c indexer head size.
"""

from __future__ import annotations

import numpy as np

from posttrain.backbone.host.arrays import NONE_I2, Attention, Compressor, Store, Tokens
from posttrain.backbone.host.loops import loop, within
from posttrain.backbone.host.sums import (
    F32,
    I64,
    add_weighted,
    copy,
    exp,
    inverse_rms,
    norm,
    product,
    rotate,
)


def attention(
    x_TH: F32,
    tokens: Tokens,
    turn_TrZ: F32,
    own: Attention,
    ring_BRd: F32,
    compressor: Compressor,
    entries: Store,
    index: Compressor,
    keys: Store,
    inv_freq_r: F32,
    freq_scaling: float,
    out_TH: F32,
) -> None:
    """Write the tokens' keys, then attend to what their slots hold."""
    latent_TR = np.empty((len(x_TH), len(own.q_a_RH)), np.float32)
    q_TX, index_TK = np.empty((len(x_TH), len(own.q_b_XR)), np.float32), NONE_I2
    project(x_TH, tokens, turn_TrZ, own, ring_BRd, latent_TR, q_TX)
    if compressor.rate:
        compress(x_TH, tokens, compressor, entries, inv_freq_r, freq_scaling)
    if index.rate:
        compress(x_TH, tokens, index, keys, inv_freq_r, freq_scaling)
        if (tokens.position_T.max(initial=-1) + 1) // index.rate > own.index_top_k:
            index_TK = np.empty((len(x_TH), own.index_top_k), np.int64)
            entry_BEc = keys.entry_BEC
            choose(x_TH, latent_TR, tokens, turn_TrZ, own, index.rate, entry_BEc, index_TK)
    entry_BEd = entries.entry_BEC
    attend(q_TX, tokens, turn_TrZ, own, ring_BRd, entry_BEd, compressor.rate, index_TK, out_TH)


@loop
def project(
    x_TH: F32,
    tokens: Tokens,
    turn_TrZ: F32,
    own: Attention,
    ring_BRd: F32,
    latent_TR: F32,
    q_TX: F32,
) -> None:
    """The queries and what they are made of; the normed, rotated keys = values of the real tokens,
    into their places of the ring."""
    product(x_TH, own.q_a_RH, latent_TR, 0, 0)
    for t in range(len(x_TH)):
        norm(latent_TR[t], own.q_a_norm_R, own.eps)
    product(latent_TR, own.q_b_XR, q_TX, 0, 0)
    kv_Td = np.empty((len(x_TH), len(own.kv_dH)), np.float32)
    product(x_TH, own.kv_dH, kv_Td, 0, 0)
    for t in range(len(kv_Td)):
        if tokens.is_real_T[t]:
            norm(kv_Td[t], own.kv_norm_d, own.eps)
            rotate(kv_Td[t], turn_TrZ[t], np.float32(1.0))
            place = tokens.position_T[t] % ring_BRd.shape[1]
            copy(kv_Td[t], ring_BRd[tokens.slot_T[t], place])


@loop
def compress(
    x_TH: F32,
    tokens: Tokens,
    own: Compressor,
    store: Store,
    inv_freq_r: F32,
    freq_scaling: float,
) -> None:
    """Remember the real tokens' projections; windows that are complete get their entry."""
    kv_TS = np.empty((len(x_TH), len(own.kv_SH)), np.float32)
    gate_TS = np.empty_like(kv_TS)
    product(x_TH, own.kv_SH, kv_TS, 0, 0)
    product(x_TH, own.gate_SH, gate_TS, 0, 0)
    ring = store.kv_BRS.shape[1]
    for t in range(len(x_TH)):
        if tokens.is_real_T[t]:
            slot, place = tokens.slot_T[t], tokens.position_T[t] % ring
            copy(kv_TS[t], store.kv_BRS[slot, place])
            copy(gate_TS[t], store.gate_BRS[slot, place])
    turn_rZ = np.empty((len(inv_freq_r), 2), np.float32)
    for t in range(len(x_TH)):
        end = tokens.position_T[t] + 1
        if tokens.is_real_T[t] and end % own.rate == 0:
            entry_C = store.entry_BEC[tokens.slot_T[t], end // own.rate - 1]
            _pool(own, store, tokens.slot_T[t], end, entry_C)
            norm(entry_C, own.norm_C, own.eps)
            for r in range(len(inv_freq_r)):
                angle = np.float32(end - own.rate) * inv_freq_r[r]
                turn_rZ[r, 0] = np.cos(angle) * np.float32(freq_scaling)
                turn_rZ[r, 1] = np.sin(angle) * np.float32(freq_scaling)
            rotate(entry_C, turn_rZ, np.float32(1.0))


@within
def _pool(own: Compressor, store: Store, slot: int, end: int, out_C: F32) -> None:
    """The values of the tokens before `end` under the softmax of their gates, channel by channel:
    where windows overlap, of the window before the last the first series, of the last the
    second."""
    size, ring = out_C.size, store.kv_BRS.shape[1]
    most_C, total_C = np.empty(size, np.float32), np.empty(size, np.float32)
    most_C[:], total_C[:], out_C[:] = np.float32(-np.inf), np.float32(0.0), np.float32(0.0)
    for sums in (False, True):
        for token in range(max(end - own.num_read, 0), end):
            first = 0 if token < end - own.rate else store.kv_BRS.shape[2] - size
            gate_C = store.gate_BRS[slot, token % ring, first : first + size]
            bias_C = own.bias_mS[token % own.rate, first : first + size]
            if not sums:
                for c in range(size):
                    most_C[c] = max(most_C[c], gate_C[c] + bias_C[c])
                continue
            kv_C = store.kv_BRS[slot, token % ring, first : first + size]
            for c in range(size):
                share = exp(gate_C[c] + bias_C[c] - most_C[c])
                total_C[c] += share
                out_C[c] += share * kv_C[c]
    for c in range(size):
        out_C[c] /= total_C[c]


@loop
def choose(
    x_TH: F32,
    latent_TR: F32,
    tokens: Tokens,
    turn_TrZ: F32,
    own: Attention,
    rate: int,
    key_BEc: F32,
    index_TK: I64,
) -> None:
    """The K entries with the highest scores that each token sees, ascending, -1 behind the last; of
    equal ones the lowest."""
    top_k, room, reach = index_TK.shape[1], key_BEc.shape[1], np.int64(0)
    for t in range(len(x_TH)):
        reach = max(reach, min((tokens.position_T[t] + 1) // rate, room))
    heads, size = len(own.index_weight_hH), key_BEc.shape[2]
    q_TX = np.empty((len(x_TH), len(own.index_q_XR)), np.float32)
    product(latent_TR, own.index_q_XR, q_TX, 0, 0)
    weight_Th = np.empty((len(x_TH), heads), np.float32)
    product(x_TH, own.index_weight_hH, weight_Th, 0, 0)
    dot_Eh, score_E = np.empty((reach, heads), np.float32), np.empty(reach, np.float32)
    q_ch = np.empty((size, heads), np.float32)
    for t in range(len(x_TH)):
        seen = min((tokens.position_T[t] + 1) // rate, room)
        if seen <= top_k:
            for k in range(top_k):
                index_TK[t, k] = k if k < seen else -1
            continue
        q_hc = q_TX[t].reshape(heads, size)
        for h in range(heads):
            rotate(q_hc[h], turn_TrZ[t], np.float32(1.0))
            for c in range(size):
                q_ch[c, h] = q_hc[h, c]
        dot_Eh[:seen] = np.float32(0.0)
        add_weighted(key_BEc[tokens.slot_T[t], :seen], q_ch, dot_Eh[:seen], 0)
        for e in range(seen):
            score = np.float32(0.0)
            for h in range(heads):
                score += weight_Th[t, h] * max(dot_Eh[e, h], np.float32(0.0))
            score_E[e] = score * np.float32(own.index_scale)
        best(score_E[:seen], index_TK[t])


@within
def best(score_E: F32, out_K: I64) -> None:
    """The places of the highest scores, ascending; of equal ones the lowest. The least of them is
    found byte by byte, from the highest on: how many scores have which."""
    rank_E, count_256 = np.empty(score_E.size, np.int64), np.empty(256, np.int64)
    for e in range(score_E.size):  # a float's bits, in the order of floats; -0 is 0
        bits = np.int64(score_E[e : e + 1].view(np.int32)[0])
        rank_E[e] = (bits if bits >= 0 else -(1 << 31) - bits) + (1 << 31)
    least, room = np.int64(0), out_K.size
    for shift in (24, 16, 8, 0):
        count_256[:] = 0
        for e in range(score_E.size):
            if rank_E[e] >> (shift + 8) == least:
                count_256[(rank_E[e] >> shift) & 255] += 1
        byte = 255
        while room > count_256[byte]:
            room -= count_256[byte]
            byte -= 1
        least = (least << 8) + byte
    k = 0
    for e in range(score_E.size):
        if rank_E[e] > least or (rank_E[e] == least and room > 0):
            room -= rank_E[e] == least
            out_K[k] = e
            k += 1


@loop
def attend(
    q_TX: F32,
    tokens: Tokens,
    turn_TrZ: F32,
    own: Attention,
    ring_BRd: F32,
    entry_BEd: F32,
    rate: int,
    index_TK: I64,
    out_TH: F32,
) -> None:
    """Each token's softmax over the sink and its keys, which are the values; of all its heads the
    output."""
    mixed_TX = np.empty_like(q_TX)
    heads, ring, size, reach = len(own.sink_h), ring_BRd.shape[1], ring_BRd.shape[2], np.int64(0)
    if rate:
        for t in range(len(q_TX)):
            reach = max(reach, (tokens.position_T[t] + 1) // rate)
    num_chosen = index_TK.shape[1]
    weight_hK = np.empty((heads, own.window + max(num_chosen, reach)), np.float32)
    chosen_Kd = np.empty((num_chosen, size), np.float32)
    for t in range(len(q_TX)):
        q_hd, out_hd = q_TX[t].reshape(heads, size), mixed_TX[t].reshape(heads, size)
        for h in range(heads):
            scale = inverse_rms(q_hd[h], own.eps) * np.float32(own.scaling)
            for c in range(size):
                q_hd[h, c] *= scale
            rotate(q_hd[h], turn_TrZ[t], np.float32(1.0))
        slot, end = tokens.slot_T[t], tokens.position_T[t] + 1
        num_window = min(end, own.window)
        first = (end - num_window) % ring
        older_Kd = ring_BRd[slot, first : min(first + num_window, ring)]
        newer_Kd = ring_BRd[slot, : num_window - len(older_Kd)]
        seen_Kd = chosen_Kd[:0]
        if num_chosen:
            num_seen = 0
            while num_seen < num_chosen and index_TK[t, num_seen] >= 0:
                copy(entry_BEd[slot, index_TK[t, num_seen]], chosen_Kd[num_seen])
                num_seen += 1
            seen_Kd = chosen_Kd[:num_seen]
        elif rate:
            seen_Kd = entry_BEd[slot, : min(end // rate, entry_BEd.shape[1])]
        num_keys = num_window + len(seen_Kd)
        product(q_hd, older_Kd, weight_hK, 0, 0)
        product(q_hd, newer_Kd, weight_hK, 0, len(older_Kd))
        product(q_hd, seen_Kd, weight_hK, 0, num_window)
        for h in range(heads):
            _softmax(weight_hK[h, :num_keys], own.sink_h[h])
        out_hd[:] = np.float32(0.0)
        add_weighted(weight_hK, older_Kd, out_hd, 0)
        add_weighted(weight_hK, newer_Kd, out_hd, len(older_Kd))
        add_weighted(weight_hK, seen_Kd, out_hd, num_window)
        for h in range(heads):
            rotate(out_hd[h], turn_TrZ[t], np.float32(-1.0))
    size, rows = own.o_a_YX.shape[1], len(own.o_a_YX) // own.num_groups
    grouped_TY = np.empty((len(q_TX), len(own.o_a_YX)), np.float32)
    for g in range(own.num_groups):
        weight_NK = own.o_a_YX[g * rows : (g + 1) * rows]
        product(mixed_TX, weight_NK, grouped_TY, g * size, g * rows)
    product(grouped_TY, own.o_b_HY, out_TH, 0, 0)


@within
def _softmax(x_K: F32, sink: np.float32) -> None:
    """In place; `sink` takes its share and has no value."""
    most, total = sink, np.float32(0.0)
    for k in range(x_K.size):
        most = max(most, x_K[k])
    for k in range(x_K.size):
        x_K[k] = exp(x_K[k] - most)
        total += x_K[k]
    total += exp(sink - most)
    for k in range(x_K.size):
        x_K[k] /= total
