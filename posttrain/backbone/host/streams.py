"""Hyper-connections of sequences and of decode steps, and their gradients; the equations are
hyper_connections.py's, and so is what they are tested against.

A token's streams are read once forward and once backward: what is made of them follows while they
are at hand. In training the products with `fn`, before and after, are torch's. BLOCK tokens are
taken at a time, whose coefficients go side by side in vectors; a block's results do not depend on
which thread takes it.

Legend: T tokens, N streams, H hidden size, C coefficients (2 N + N N, or the head's N, which has no
post and no comb), B tokens of a block, A their blocks, I iterations.
"""

from __future__ import annotations

import numpy as np

from posttrain.backbone.host.arrays import Connection
from posttrain.backbone.host.loops import loop, within
from posttrain.backbone.host.sinkhorn import BLOCK, sinkhorn, sinkhorn_backward
from posttrain.backbone.host.sums import F32, add_weighted, inverse_rms, norm, product, sigmoid


@within
def collapse(x_NH: F32, weight_1N: F32, out_1H: F32) -> None:
    """sum_n weight[n] x[n]."""
    out_1H[:] = np.float32(0.0)
    add_weighted(weight_1N, x_NH, out_1H, 0)


@within
def find_logits(
    start: int, count: int, raw_CT: F32, scale_T: F32, base_C: F32, gain_C: F32, logit_CB: F32
) -> None:
    """Of `count` tokens; the rest of the block stays as it is."""
    scale_B = scale_T[start : start + count]
    for c in range(len(raw_CT)):
        raw_B, logit_B, gain, base = (
            raw_CT[c, start : start + count],
            logit_CB[c],
            gain_C[c],
            base_C[c],
        )
        for b in range(count):
            logit_B[b] = raw_B[b] * scale_B[b] * gain + base


def read_blocks(
    first: int,
    end: int,
    x_TNH: F32,
    raw_CT: F32,
    base_C: F32,
    gain_C: F32,
    norm_eps: float,
    eps: float,
    iterations: int,
    scale_T: F32,
    collapsed_TH: F32,
    post_TN: F32,
    comb_TNN: F32,
) -> None:
    """Of raw = fn @ x: 1 / rms(x), what a block reads, post, and comb transposed."""
    num, small = x_TNH.shape[1], np.float32(eps)
    has_comb = len(raw_CT) > num
    logit_CB = np.zeros((len(raw_CT), BLOCK), np.float32)
    pre_1N = np.empty((1, num), np.float32)
    for start in range(first, end, BLOCK):
        count = min(BLOCK, end - start)
        for t in range(start, start + count):
            scale_T[t] = inverse_rms(x_TNH[t].reshape(x_TNH[t].size), norm_eps)
        find_logits(start, count, raw_CT, scale_T, base_C, gain_C, logit_CB)
        if has_comb:
            sinkhorn(logit_CB[2 * num :].ctypes, num, iterations, small)
        for b in range(count):
            t = start + b
            for n in range(num):
                pre_1N[0, n] = sigmoid(logit_CB[n, b]) + small
            collapse(x_TNH[t], pre_1N, collapsed_TH[t : t + 1])
            if has_comb:
                for k in range(num):
                    post_TN[t, k] = np.float32(2.0) * sigmoid(logit_CB[num + k, b])
                    for j in range(num):
                        comb_TNN[t, k, j] = logit_CB[2 * num + j * num + k, b]


read, read_within = loop(read_blocks), within(read_blocks)


@loop
def read_step(x_TNH: F32, own: Connection, out_TH: F32, post_TN: F32, comb_TNN: F32) -> None:
    """`read_blocks` of a decode step's tokens, or after the last layer; normed."""
    tokens, num, size = x_TNH.shape
    raw_CT, scale_T = np.empty((len(own.fn_CX), tokens), np.float32), np.empty(tokens, np.float32)
    product(own.fn_CX, x_TNH.reshape(tokens, num * size), raw_CT, 0, 0)
    gain_C = np.empty(len(raw_CT), np.float32)
    for c in range(len(raw_CT)):
        gain_C[c] = own.scale_3[min(c // num, 2)]
    read_within(
        0,
        tokens,
        x_TNH,
        raw_CT,
        own.base_C,
        gain_C,
        own.norm_eps,
        own.eps,
        own.iterations,
        scale_T,
        out_TH,
        post_TN,
        comb_TNN,
    )
    for t in range(tokens):
        norm(out_TH[t], own.weight_H, own.weight_eps)


@loop
def write(
    first: int, end: int, x_TNH: F32, y_TH: F32, post_TN: F32, comb_TNN: F32, out_TNH: F32
) -> None:
    """post[k] y + sum_j comb[j, k] x[j]."""
    num, size = out_TNH.shape[1:]
    for t in range(first, end):
        x_NH, y_H, out_NH = x_TNH[t], y_TH[t], out_TNH[t]
        for k in range(num):
            post, comb_N = post_TN[t, k], comb_TNN[t, k]
            if num == 4:  # V4's: one pass
                a, b, c, d = comb_N[0], comb_N[1], comb_N[2], comb_N[3]
                for h in range(size):
                    left = a * x_NH[0, h] + b * x_NH[1, h]
                    out_NH[k, h] = post * y_H[h] + left + (c * x_NH[2, h] + d * x_NH[3, h])
                continue
            for h in range(size):
                out_NH[k, h] = post * y_H[h]
        if num != 4:
            add_weighted(comb_TNN[t], x_NH, out_NH, 0)


@loop
def write_backward(
    first: int,
    end: int,
    grad_TNH: F32,
    y_TH: F32,
    post_TN: F32,
    grad_y_TH: F32,
    grad_post_TN: F32,
) -> None:
    """What reaches y and post."""
    num = grad_TNH.shape[1]
    grad_N1 = np.empty((num, 1), np.float32)
    for t in range(first, end):
        collapse(grad_TNH[t], post_TN[t : t + 1], grad_y_TH[t : t + 1])
        product(grad_TNH[t], y_TH[t : t + 1], grad_N1, 0, 0)
        for n in range(num):
            grad_post_TN[t, n] = grad_N1[n, 0]


@within
def dots(
    start: int,
    count: int,
    x_TNH: F32,
    grad_TH: F32,
    grad_post_TN: F32,
    grad_new_TNH: F32,
    grad_CB: F32,
) -> None:
    """What reaches pre, post and comb."""
    num = x_TNH.shape[1]
    grad_N1, grad_NN = np.empty((num, 1), np.float32), np.empty((num, num), np.float32)
    for b in range(count):
        t = start + b
        product(x_TNH[t], grad_TH[t : t + 1], grad_N1, 0, 0)
        for n in range(num):
            grad_CB[n, b] = grad_N1[n, 0]
        if len(grad_CB) > num:
            product(x_TNH[t], grad_new_TNH[t], grad_NN, 0, 0)
            for j in range(num):
                grad_CB[num + j, b] = grad_post_TN[t, j]
                for k in range(num):
                    grad_CB[2 * num + j * num + k, b] = grad_NN[j, k]


@within
def gates_backward(num: int, iterations: int, eps: np.float32, gates_CB: F32, grad_CB: F32) -> None:
    """In the place of the logits pre, half of post, and comb; in that of their gradients the
    logits'."""
    one, two = np.float32(1.0), np.float32(2.0)
    for c in range(min(2 * num, len(gates_CB))):
        gate_B, grad_B, factor, shift = gates_CB[c], grad_CB[c], one, eps
        if c >= num:
            factor, shift = two, np.float32(0.0)
        for b in range(BLOCK):
            gate = sigmoid(gate_B[b])
            grad_B[b] *= factor * gate * (one - gate)
            gate_B[b] = gate + shift
    if len(gates_CB) > num:
        comb_CB, grad_CB = gates_CB[2 * num :], grad_CB[2 * num :]
        sinkhorn_backward(comb_CB.ctypes, grad_CB.ctypes, num, iterations, eps)


@within
def streams_backward(
    start: int,
    count: int,
    x_TNH: F32,
    grad_TH: F32,
    grad_new_TNH: F32,
    gates_CB: F32,
    through_B: F32,
    grad_x_TNH: F32,
) -> None:
    """through x[j] + pre[j] grad + sum_k comb[j, k] grad_new[k]."""
    num = x_TNH.shape[1]
    comb_NN = np.empty((num, num), np.float32)
    for b in range(count):
        t, through = start + b, through_B[b]
        for j in range(num):
            out_H, x_H, grad_H, pre = grad_x_TNH[t, j], x_TNH[t, j], grad_TH[t], gates_CB[j, b]
            for h in range(len(out_H)):
                out_H[h] = through * x_H[h] + pre * grad_H[h]
        if len(gates_CB) > num:
            for j in range(num):
                for k in range(num):
                    comb_NN[j, k] = gates_CB[2 * num + j * num + k, b]
            add_weighted(comb_NN, grad_new_TNH[t], grad_x_TNH[t], 0)


@within
def spread_gradient(
    start: int,
    count: int,
    size: int,
    raw_CT: F32,
    scale_T: F32,
    gain_C: F32,
    grad_CB: F32,
    grad_CT: F32,
    through_B: F32,
    sum_ZC: F32,
) -> None:
    """From the logits' gradients: raw's, base's and gain's sums, and what of x comes to x through
    its rms over `size` numbers."""
    scale_B = scale_T[start : start + count]
    through_B[:] = np.float32(0.0)
    for c in range(len(grad_CB)):
        grad_B, raw_B = grad_CB[c], raw_CT[c, start : start + count]
        out_B, gain = grad_CT[c, start : start + count], gain_C[c]
        share = gain / np.float32(-size)
        base_sum = gain_sum = np.float32(0.0)
        for b in range(count):
            base_sum += grad_B[b]
            gain_sum += grad_B[b] * raw_B[b] * scale_B[b]
        for b in range(count):
            along = grad_B[b] * raw_B[b] * scale_B[b]
            out_B[b] = grad_B[b] * gain * scale_B[b]
            through_B[b] += along * share * scale_B[b] * scale_B[b]
        sum_ZC[0, c], sum_ZC[1, c] = base_sum, gain_sum


@loop
def read_backward(
    first: int,
    end: int,
    x_TNH: F32,
    raw_CT: F32,
    scale_T: F32,
    base_C: F32,
    gain_C: F32,
    eps: float,
    iterations: int,
    grad_TH: F32,
    grad_post_TN: F32,
    grad_new_TNH: F32,
    grad_CT: F32,
    grad_x_TNH: F32,
    sum_AZC: F32,
) -> None:
    """From the gradients at what a block reads, at post and at the streams after it: those at raw;
    at x, but for what comes through raw; and each block's sums of base's and gain's."""
    gates_CB = np.zeros((len(raw_CT), BLOCK), np.float32)
    grad_CB = np.zeros((len(raw_CT), BLOCK), np.float32)
    through_B = np.zeros(BLOCK, np.float32)
    for start in range(first, end, BLOCK):
        count = min(BLOCK, end - start)
        find_logits(start, count, raw_CT, scale_T, base_C, gain_C, gates_CB)
        dots(start, count, x_TNH, grad_TH, grad_post_TN, grad_new_TNH, grad_CB)
        gates_backward(x_TNH.shape[1], iterations, np.float32(eps), gates_CB, grad_CB)
        sum_ZC, size = sum_AZC[start // BLOCK], x_TNH[0].size
        spread_gradient(
            start, count, size, raw_CT, scale_T, gain_C, grad_CB, grad_CT, through_B, sum_ZC
        )
        streams_backward(
            start, count, x_TNH, grad_TH, grad_new_TNH, gates_CB, through_B, grad_x_TNH
        )
