"""Hyper-connections of whole sequences, and their gradients; the equations are
hyper_connections.py's, and so is what they are tested against.

A token's streams are read once forward and once backward: what is made of them follows while they
are at hand. The products with `fn`, before and after, are torch's. BLOCK tokens are taken at a
time, whose coefficients go side by side in vectors; a block's results do not depend on which
thread takes it.

Legend: T tokens, N streams, H hidden size, C coefficients (2 N + N N, or the head's N, which has no
post and no comb), B tokens of a block, A their blocks, I iterations.
"""

from __future__ import annotations

import numpy as np

from posttrain.backbone.host import loop
from posttrain.backbone.host.hyper import BLOCK, add_products, collapse, rescale, sinkhorn
from posttrain.backbone.host.sums import F32, add_weighted, exp, inverse_rms, product, sigmoid


@loop
def read(
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
            comb_NNB = logit_CB[2 * num :].reshape(num, num, BLOCK)
            sinkhorn(comb_NNB, iterations, small)
        for b in range(count):
            t = start + b
            for n in range(num):
                pre_1N[0, n] = sigmoid(logit_CB[n, b]) + small
            collapse(x_TNH[t].reshape(x_TNH[t].size), pre_1N, collapsed_TH[t : t + 1])
            if has_comb:
                for k in range(num):
                    post_TN[t, k] = np.float32(2.0) * sigmoid(logit_CB[num + k, b])
                    for j in range(num):
                        comb_TNN[t, k, j] = logit_CB[2 * num + j * num + k, b]


@loop
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


@loop
def write(
    first: int, end: int, x_TNH: F32, y_TH: F32, post_TN: F32, comb_TNN: F32, out_TNH: F32
) -> None:
    """post[k] y + sum_j comb[j, k] x[j]."""
    num, size = out_TNH.shape[1:]
    for t in range(first, end):
        y_H = y_TH[t]
        for k in range(num):
            out_H, post = out_TNH[t, k], post_TN[t, k]
            for h in range(size):
                out_H[h] = post * y_H[h]
        add_weighted(comb_TNN[t], x_TNH[t], out_TNH[t], 0)


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
        grad_X = grad_TNH[t].reshape(grad_TNH[t].size)
        collapse(grad_X, post_TN[t : t + 1], grad_y_TH[t : t + 1])
        product(grad_TNH[t], y_TH[t : t + 1], grad_N1, 0, 0)
        for n in range(num):
            grad_post_TN[t, n] = grad_N1[n, 0]


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


@loop
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


@loop
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
        comb_NNB = gates_CB[2 * num :].reshape(num, num, BLOCK)
        grad_NNB = grad_CB[2 * num :].reshape(num, num, BLOCK)
        sinkhorn_backward(comb_NNB, grad_NNB, iterations, eps)


@loop
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


@loop
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
            along = grad_B[b] * raw_B[b] * scale_B[b]
            base_sum += grad_B[b]
            gain_sum += along
            out_B[b] = grad_B[b] * gain * scale_B[b]
            through_B[b] += along * share * scale_B[b] * scale_B[b]
        sum_ZC[0, c], sum_ZC[1, c] = base_sum, gain_sum


@loop
def sinkhorn_backward(comb_NNB: F32, grad_NNB: F32, iterations: int, eps: np.float32) -> None:
    """`sinkhorn` of the logits in `comb`, in place, and in the place of its gradient the logits'.

    comb = left[j] soft[j, k] right[k]. All that left and right were is kept, and their sweeps are
    undone one by one; a sweep's right is that before, / (right sum_j(left soft) + eps)."""
    num = len(comb_NNB)
    soft_NNB, turned_NNB = np.empty_like(comb_NNB), np.empty_like(comb_NNB)
    softmax(comb_NNB, soft_NNB)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] = turned_NNB[k, j, b] = soft_NNB[j, k, b] + eps
    left_INB = np.ones((max(iterations, 1), num, BLOCK), np.float32)
    right_INB = np.ones((iterations + 1, num, BLOCK), np.float32)
    for i in range(iterations):
        if i:
            left_INB[i] = left_INB[i - 1]
            rescale(comb_NNB, right_INB[i], left_INB[i], eps)
        right_INB[i + 1] = right_INB[i]
        rescale(turned_NNB, left_INB[i], right_INB[i + 1], eps)
    undo_sweeps(comb_NNB, turned_NNB, left_INB, right_INB, grad_NNB, eps)
    total_B = np.empty(BLOCK, np.float32)
    for j in range(num):
        add_products(grad_NNB[j], soft_NNB[j], total_B)
        for k in range(num):
            grad_B, soft_B, comb_B = grad_NNB[j, k], soft_NNB[j, k], comb_NNB[j, k]
            left_B, right_B = left_INB[-1, j], right_INB[-1, k]
            for b in range(BLOCK):
                grad_B[b] = (grad_B[b] - total_B[b]) * soft_B[b]
            for b in range(BLOCK):
                comb_B[b] *= left_B[b] * right_B[b]


@loop
def undo_sweeps(
    soft_NNB: F32, turned_NNB: F32, left_INB: F32, right_INB: F32, grad_NNB: F32, eps: np.float32
) -> None:
    """In the place of comb's gradient that of what is swept."""
    num = len(soft_NNB)
    left_NB, right_NB = np.zeros((num, BLOCK), np.float32), np.zeros((num, BLOCK), np.float32)
    grad_turned_NNB = np.zeros_like(turned_NNB)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                grad = grad_NNB[j, k, b] * left_INB[-1, j, b] * right_INB[-1, k, b]
                left_NB[j, b] += grad * soft_NNB[j, k, b]
                right_NB[k, b] += grad * soft_NNB[j, k, b]
                grad_NNB[j, k, b] = grad
    for i in range(len(right_INB) - 2, -1, -1):
        old_NB, new_NB, other_NB = right_INB[i], right_INB[i + 1], left_INB[i]
        undo(soft_NNB, old_NB, new_NB, other_NB, right_NB, left_NB, grad_NNB, eps)
        if i:
            old_NB, new_NB, other_NB = left_INB[i - 1], left_INB[i], right_INB[i]
            undo(turned_NNB, old_NB, new_NB, other_NB, left_NB, right_NB, grad_turned_NNB, eps)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                grad_NNB[j, k, b] += grad_turned_NNB[k, j, b]


@loop
def softmax(logit_NNB: F32, out_NNB: F32) -> None:
    """Over k."""
    num = len(logit_NNB)
    most_B, total_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for j in range(num):
        most_B[:] = logit_NNB[j, 0]
        for k in range(1, num):
            for b in range(BLOCK):
                most_B[b] = max(most_B[b], logit_NNB[j, k, b])
        total_B[:] = np.float32(0.0)
        for k in range(num):
            for b in range(BLOCK):
                out_NNB[j, k, b] = exp(logit_NNB[j, k, b] - most_B[b])
                total_B[b] += out_NNB[j, k, b]
        for k in range(num):
            for b in range(BLOCK):
                out_NNB[j, k, b] /= total_B[b]


@loop
def undo(
    soft_NNB: F32,
    old_NB: F32,
    new_NB: F32,
    other_NB: F32,
    grad_own_NB: F32,
    grad_other_NB: F32,
    grad_NNB: F32,
    eps: np.float32,
) -> None:
    """The gradients at a sweep's old, other and soft[m, n] from that at new; old's, new's and
    other's are at their logarithms."""
    num = len(old_NB)
    total_B, down_NB = np.empty(BLOCK, np.float32), np.empty_like(old_NB)
    for n in range(num):
        for b in range(BLOCK):
            down_NB[n, b] = new_NB[n, b] * grad_own_NB[n, b]
            grad_own_NB[n, b] = eps * down_NB[n, b] / old_NB[n, b]
    for m in range(num):
        add_products(soft_NNB[m], down_NB, total_B)
        for b in range(BLOCK):
            grad_other_NB[m, b] -= other_NB[m, b] * total_B[b]
        for n in range(num):
            for b in range(BLOCK):
                grad_NNB[m, n, b] -= other_NB[m, b] * down_NB[n, b]
