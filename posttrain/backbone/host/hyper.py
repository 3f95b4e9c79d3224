"""Hyper-connections of one decode step; the equations are hyper_connections.py's, and so is what
they are tested against.

Legend: T tokens, N streams, H hidden size, X = N H, C = 2 N + N N coefficients, B tokens of a
block.
"""

from __future__ import annotations

import numpy as np

from posttrain.backbone.host import loop
from posttrain.backbone.host.arrays import Connection
from posttrain.backbone.host.sums import (
    F32,
    add_weighted,
    exp,
    inverse_rms,
    norm,
    product,
    sigmoid,
)

BLOCK = 64
"""Tokens whose Sinkhorn sweeps go side by side in vectors."""


@loop
def read(x_TX: F32, own: Connection, out_TH: F32, post_TN: F32, comb_TNN: F32) -> None:
    """What a block reads of the streams, normed, and how they take what it gives: post, and comb
    transposed."""
    num, tokens, eps = post_TN.shape[1], len(x_TX), np.float32(own.eps)
    raw_TC = np.empty((tokens, len(own.base_C)), np.float32)
    product(x_TX, own.fn_CX, raw_TC, 0, 0)
    pre_1N = np.empty((1, num), np.float32)
    comb_NNB = np.zeros((num, num, BLOCK), np.float32)
    for first in range(0, tokens, BLOCK):
        count = min(BLOCK, tokens - first)
        for b in range(count):
            t = first + b
            scale = inverse_rms(x_TX[t], own.norm_eps)
            for n in range(num):
                pre = raw_TC[t, n] * scale * own.scale_3[0] + own.base_C[n]
                post = raw_TC[t, num + n] * scale * own.scale_3[1] + own.base_C[num + n]
                pre_1N[0, n] = sigmoid(pre) + eps
                post_TN[t, n] = np.float32(2.0) * sigmoid(post)
            for j in range(num):
                for k in range(num):
                    c = 2 * num + j * num + k
                    comb_NNB[j, k, b] = raw_TC[t, c] * scale * own.scale_3[2] + own.base_C[c]
            collapse(x_TX[t], pre_1N, out_TH[t : t + 1])
            norm(out_TH[t], own.weight_H, own.weight_eps)
        sinkhorn(comb_NNB, own.iterations, eps)
        for b in range(count):
            for j in range(num):
                for k in range(num):
                    comb_TNN[first + b, k, j] = comb_NNB[j, k, b]


@loop
def collapse(x_X: F32, weight_1N: F32, out_1H: F32) -> None:
    """sum_n weight[n] x[n]."""
    out_1H[:] = np.float32(0.0)
    add_weighted(weight_1N, x_X.reshape(weight_1N.shape[1], out_1H.shape[1]), out_1H, 0)


@loop
def sinkhorn(comb_NNB: F32, iterations: int, eps: np.float32) -> None:
    """softmax over k, plus eps; columns, then (rows, columns) `iterations - 1` times, each divided
    by its sum + eps; in place, BLOCK tokens side by side."""
    num = len(comb_NNB)
    total_B = np.empty(BLOCK, np.float32)
    for j in range(num):
        total_B[:] = comb_NNB[j, 0]
        for k in range(1, num):
            for b in range(BLOCK):
                total_B[b] = max(total_B[b], comb_NNB[j, k, b])
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] = exp(comb_NNB[j, k, b] - total_B[b])
        total_B[:] = np.float32(0.0)
        for k in range(num):
            for b in range(BLOCK):
                total_B[b] += comb_NNB[j, k, b]
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] = comb_NNB[j, k, b] / total_B[b] + eps
    # comb = left[j] soft[j, k] right[k]: a sweep changes one of them alone
    left_NB, right_NB = np.ones((num, BLOCK), np.float32), np.ones((num, BLOCK), np.float32)
    turned_NNB = np.empty_like(comb_NNB)
    for j in range(num):
        for k in range(num):
            turned_NNB[k, j] = comb_NNB[j, k]
    for sweep in range(2 * iterations - 1):
        if sweep % 2:
            rescale(comb_NNB, right_NB, left_NB, eps)
        else:
            rescale(turned_NNB, left_NB, right_NB, eps)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] *= left_NB[j, b] * right_NB[k, b]


@loop
def rescale(soft_NNB: F32, other_NB: F32, own_NB: F32, eps: np.float32) -> None:
    """own[m] / (own[m] sum_n(soft[m, n] other[n]) + eps), in place: a sweep."""
    total_B = np.empty(BLOCK, np.float32)
    for m in range(len(own_NB)):
        x_NB, own_B = soft_NNB[m], own_NB[m]
        if len(x_NB) == 4:  # V4's: one pass
            a_B, b_B, c_B, d_B = other_NB[0], other_NB[1], other_NB[2], other_NB[3]
            e_B, f_B, g_B, h_B = x_NB[0], x_NB[1], x_NB[2], x_NB[3]
            for b in range(BLOCK):
                total = (a_B[b] * e_B[b] + b_B[b] * f_B[b]) + (c_B[b] * g_B[b] + d_B[b] * h_B[b])
                own_B[b] = own_B[b] / (own_B[b] * total + eps)
        else:
            add_products(x_NB, other_NB, total_B)
            for b in range(BLOCK):
                own_B[b] = own_B[b] / (own_B[b] * total_B[b] + eps)


@loop
def add_products(x_NB: F32, y_NB: F32, total_B: F32) -> None:
    """total = sum_n x[n] y[n], by number."""
    total_B[:] = np.float32(0.0)
    num = len(x_NB)
    for n in range(0, num - 3, 4):
        for b in range(BLOCK):
            two = x_NB[n, b] * y_NB[n, b] + x_NB[n + 1, b] * y_NB[n + 1, b]
            last = x_NB[n + 2, b] * y_NB[n + 2, b] + x_NB[n + 3, b] * y_NB[n + 3, b]
            total_B[b] += two + last
    for n in range(num - num % 4, num):
        for b in range(BLOCK):
            total_B[b] += x_NB[n, b] * y_NB[n, b]


@loop
def write(x_TX: F32, y_TH: F32, post_TN: F32, comb_TNN: F32) -> None:
    """The streams after the block that gave y, in place."""
    num, size = post_TN.shape[1], y_TH.shape[1]
    old_NH = np.empty((num, size), np.float32)
    for t in range(len(x_TX)):
        new_NH, y_H = x_TX[t].reshape(num, size), y_TH[t]
        if num == 4:
            _write_four(new_NH[0], new_NH[1], new_NH[2], new_NH[3], y_H, post_TN[t], comb_TNN[t])
            continue
        old_NH[:] = new_NH
        for k in range(num):
            new_H, post = new_NH[k], post_TN[t, k]
            for h in range(size):
                new_H[h] = post * y_H[h]
        add_weighted(comb_TNN[t], old_NH, new_NH, 0)


@loop
def _write_four(p_H: F32, q_H: F32, r_H: F32, s_H: F32, y_H: F32, post_N: F32, c_NN: F32) -> None:
    """`write` of a token with four streams, in one pass."""
    c00, c01, c02, c03, post0 = c_NN[0, 0], c_NN[0, 1], c_NN[0, 2], c_NN[0, 3], post_N[0]
    c10, c11, c12, c13, post1 = c_NN[1, 0], c_NN[1, 1], c_NN[1, 2], c_NN[1, 3], post_N[1]
    c20, c21, c22, c23, post2 = c_NN[2, 0], c_NN[2, 1], c_NN[2, 2], c_NN[2, 3], post_N[2]
    c30, c31, c32, c33, post3 = c_NN[3, 0], c_NN[3, 1], c_NN[3, 2], c_NN[3, 3], post_N[3]
    for h in range(y_H.size):
        p, q, r, s, y = p_H[h], q_H[h], r_H[h], s_H[h], y_H[h]
        p_H[h] = post0 * y + (c00 * p + c01 * q) + (c02 * r + c03 * s)
        q_H[h] = post1 * y + (c10 * p + c11 * q) + (c12 * r + c13 * s)
        r_H[h] = post2 * y + (c20 * p + c21 * q) + (c22 * r + c23 * s)
        s_H[h] = post3 * y + (c30 * p + c31 * q) + (c32 * r + c33 * s)


@loop
def read_last(x_TX: F32, own: Connection, out_TH: F32) -> None:
    """The streams after the last layer as one, normed."""
    num = len(own.base_C)
    raw_TN = np.empty((len(x_TX), num), np.float32)
    product(x_TX, own.fn_CX, raw_TN, 0, 0)
    pre_1N = np.empty((1, num), np.float32)
    for t in range(len(x_TX)):
        scale = inverse_rms(x_TX[t], own.norm_eps)
        for n in range(num):
            pre = raw_TN[t, n] * scale * own.scale_3[0] + own.base_C[n]
            pre_1N[0, n] = sigmoid(pre) + np.float32(own.eps)
        collapse(x_TX[t], pre_1N, out_TH[t : t + 1])
        norm(out_TH[t], own.weight_H, own.weight_eps)
