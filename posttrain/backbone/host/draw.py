"""A token of each row from its logits (posttrain/rollout/sampling.py, with which it is tested): one
pass over a row in float64, and a second over a few of its numbers.

Legend: B rows, V vocabulary, K blocks of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.backbone.host.loops import loop, within
from posttrain.backbone.host.sums import F32, I64
from posttrain.backbone.host.threads import even, spread

F64 = NDArray[np.float64]

BLOCK = 64
"""Tokens whose probabilities are looked through one by one once their sum has told that the token
is among them."""

FLOPS = 32
"""About what a number of the vocabulary takes."""


def draw(
    logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) int64 and their log-probabilities (B,) float64, tempered; of a row at temperature
    0 the lowest of the best, at temperature 1.

    Args:
        logits_BV: float32 on a CPU; -inf: never.
        uniform_B: float64 in [0, 1).
        temperature_B: float64; None: 1.
    """
    rows, size = logits_BV.shape
    token_B, logp_B = np.empty(rows, np.int64), np.empty(rows)
    logits, share_B = logits_BV.contiguous().numpy(), uniform_B.numpy()
    heat_B = np.ones(rows) if temperature_B is None else temperature_B.numpy()

    def work(first: int, end: int) -> None:
        part = slice(first, end)
        pick(logits[part], share_B[part], heat_B[part], token_B[part], logp_B[part])

    spread(work, even(rows, FLOPS * size))
    return torch.from_numpy(token_B), torch.from_numpy(logp_B)


@loop
def pick(logits_BV: F32, uniform_B: F64, temperature_B: F64, token_B: I64, logp_B: F64) -> None:
    """`draw`: the token at which the sum of probabilities passes `uniform`."""
    num = logits_BV.shape[1]
    p_V, sum_K = np.empty(num), np.empty(-(-num // BLOCK))
    for b in range(len(logits_BV)):
        x_V, is_greedy = logits_BV[b], temperature_B[b] == 0
        sharpness = 1.0 if is_greedy else 1.0 / temperature_B[b]
        most = np.float64(highest(x_V))
        for v in range(num):
            p_V[v] = exp((np.float64(x_V[v]) - most) * sharpness)
        total = 0.0
        for k in range(len(sum_K)):
            mass = 0.0
            for v in range(k * BLOCK, min((k + 1) * BLOCK, num)):
                mass += p_V[v]
            sum_K[k] = mass
            total += mass
        token = first_of(x_V, most) if is_greedy else passing(p_V, sum_K, uniform_B[b] * total)
        token_B[b] = token
        logp_B[b] = (np.float64(x_V[token]) - most) * sharpness - np.log(total)


@within
def highest(x_V: F32) -> np.float32:
    """Their maximum, found among whole numbers that are in their order: a maximum of floats does
    not go in vectors, for the sake of NaN."""
    bits_V = x_V.view(np.int32)
    most = np.int32(-(1 << 31))
    for v in range(bits_V.size):
        bits = bits_V[v]
        most = max(most, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@within
def first_of(x_V: F32, most: np.float64) -> int:
    found = 0
    while found < x_V.size - 1 and x_V[found] != most:
        found += 1
    return found


@within
def passing(p_V: F64, sum_K: F64, target: np.float64) -> int:
    """The first token whose probability takes the sum above `target`; where rounding leaves none,
    the last that has any."""
    passed, k = 0.0, 0
    while k < sum_K.size - 1 and passed + sum_K[k] <= target:
        passed += sum_K[k]
        k += 1
    found = 0
    for v in range(k * BLOCK, p_V.size):
        if p_V[v] > 0:
            found = v
            passed += p_V[v]
            if passed > target:
                return found
    return found


@within
def exp(x: Any) -> Any:
    """e^x to 4e-16 of itself, of x up to 0; below -700 it is 0. In vectors: Taylor's polynomial of
    x - n ln 2, and 2^n by its bits."""
    y = max(x, -700.0)
    n = np.floor(y * 1.4426950408889634 + 0.5)
    r = y - n * 0.693145751953125 - n * 1.4286068203094172e-06
    p = 1.6059043836821613e-10  # 1 / 13!, and so on
    p = p * r + 2.08767569878681e-09
    p = p * r + 2.505210838544172e-08
    p = p * r + 2.755731922398589e-07
    p = p * r + 2.7557319223985893e-06
    p = p * r + 2.48015873015873e-05
    p = p * r + 0.0001984126984126984
    p = p * r + 0.001388888888888889
    p = p * r + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    power = np.int64((np.int64(np.int32(n)) + 1023) << 52).view(np.float64)
    return p * power if x >= -700.0 else 0.0
