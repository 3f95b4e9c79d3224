"""Sinkhorn's sweeps and their gradient, of BLOCK tokens side by side in vectors; the equations are
hyper_connections.py's, and so is what they are tested against.

Legend: N streams, B tokens of a block, I iterations; comb axes (from stream j, to stream k).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.backbone.host.loops import carray, outlined, within
from posttrain.backbone.host.sums import F32, copy, exp

BLOCK = 64
"""Tokens whose Sinkhorn sweeps go side by side in vectors."""


@within
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


@within
def softmax(logit_NNB: F32, out_NNB: F32) -> None:
    """Over k."""
    num = len(logit_NNB)
    most_B, total_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for j in range(num):
        copy(logit_NNB[j, 0], most_B)
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


@within
def rescale(soft_NNB: F32, other_NB: F32, old_NB: F32, new_NB: F32, eps: np.float32) -> None:
    """new[m] = old[m] / (old[m] sum_n(soft[m, n] other[n]) + eps): a sweep."""
    total_B = np.empty(BLOCK, np.float32)
    for m in range(len(old_NB)):
        add_products(soft_NNB[m], other_NB, total_B)
        for b in range(BLOCK):
            new_NB[m, b] = old_NB[m, b] / (old_NB[m, b] * total_B[b] + eps)


@outlined("floats int int float")
def sinkhorn(comb: Any, num: int, iterations: int, eps: np.float32) -> None:
    """Of the logits comb (N, N, B), in place: softmax over k, plus eps; columns, then (rows,
    columns) `iterations - 1` times, each divided by its sum + eps."""
    comb_NNB = carray(comb, (num, num, BLOCK))
    turned_NNB = np.empty_like(comb_NNB)
    softmax(comb_NNB, comb_NNB)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] += eps
            copy(comb_NNB[j, k], turned_NNB[k, j])
    # comb = left[j] soft[j, k] right[k]: a sweep changes one of them alone
    left_NB, right_NB = np.ones((num, BLOCK), np.float32), np.ones((num, BLOCK), np.float32)
    for i in range(iterations):
        if i:
            rescale(comb_NNB, right_NB, left_NB, left_NB, eps)
        rescale(turned_NNB, left_NB, right_NB, right_NB, eps)
    for j in range(num):
        for k in range(num):
            for b in range(BLOCK):
                comb_NNB[j, k, b] *= left_NB[j, b] * right_NB[k, b]


@within
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


@within
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


@outlined("floats floats int int float")
def sinkhorn_backward(comb: Any, grad: Any, num: int, iterations: int, eps: np.float32) -> None:
    """`sinkhorn` of the logits in `comb`, in place, and in the place of its gradient the logits'.

    comb = left[j] soft[j, k] right[k]. All that left and right were is kept, and their sweeps are
    undone one by one; a sweep's right is that before, / (right sum_j(left soft) + eps)."""
    comb_NNB, grad_NNB = carray(comb, (num, num, BLOCK)), carray(grad, (num, num, BLOCK))
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
            rescale(comb_NNB, right_INB[i], left_INB[i - 1], left_INB[i], eps)
        rescale(turned_NNB, left_INB[i], right_INB[i], right_INB[i + 1], eps)
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
