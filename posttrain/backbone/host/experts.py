"""The mixture of experts of one decode step (experts.py, routing.py, against which it is tested).

Legend: T tokens, H hidden size, E experts, k experts a token, P rows of one expert, I an expert's
channels, J = 2 I gate and up channels.
"""

from __future__ import annotations

import math

import numpy as np

from posttrain.backbone.host.arrays import Choices, Experts
from posttrain.backbone.host.loops import loop, within
from posttrain.backbone.host.sums import F32, I64, Bool, copy, product, sigmoid
from posttrain.backbone.routing import LOWEST_LOGIT

LOWEST = np.float32(LOWEST_LOGIT)


@loop
def mix(
    x_TH: F32, own: Experts, told_Tk: I64, is_real_T: Bool, choices: Choices, out_TH: F32
) -> None:
    """What the shared expert gives of every token, and the chosen ones of every real one."""
    route(x_TH, own, told_Tk, choices)
    tokens, size = x_TH.shape
    channels = len(own.shared_gate_IH)
    gate_TI = np.empty((tokens, channels), np.float32)
    up_TI, hidden_TI = np.empty_like(gate_TI), np.empty_like(gate_TI)
    product(x_TH, own.shared_gate_IH, gate_TI, 0, 0)
    product(x_TH, own.shared_up_IH, up_TI, 0, 0)
    for t in range(tokens):
        _gated(gate_TI[t], up_TI[t], own.shared_limit, np.float32(1.0), hidden_TI[t])
    product(hidden_TI, own.shared_down_HI, out_TH, 0, 0)
    channels = own.down_EHI.shape[2]
    x_PH, token_P = np.empty((tokens, size), np.float32), np.empty(tokens, np.int64)
    gate_up_PJ, hidden_PI = (
        np.empty((tokens, 2 * channels), np.float32),
        np.empty((tokens, channels), np.float32),
    )
    weight_P, y_PH = np.empty(tokens, np.float32), np.empty((tokens, size), np.float32)
    for e in range(len(own.down_EHI)):
        rows = 0
        for t in range(tokens):
            weight, is_chosen = np.float32(0.0), False
            for j in range(choices.expert_Tk.shape[1]):  # told twice it counts twice
                if is_real_T[t] and choices.expert_Tk[t, j] == e:
                    weight, is_chosen = weight + choices.weight_Tk[t, j], True
            if is_chosen:
                copy(x_TH[t], x_PH[rows])
                token_P[rows], weight_P[rows] = t, weight
                rows += 1
        product(x_PH[:rows], own.gate_up_EJH[e], gate_up_PJ, 0, 0)
        for p in range(rows):
            gate_I, up_I = gate_up_PJ[p, :channels], gate_up_PJ[p, channels:]
            _gated(gate_I, up_I, own.limit, weight_P[p], hidden_PI[p])
        product(hidden_PI[:rows], own.down_EHI[e], y_PH, 0, 0)
        for p in range(rows):
            out_H = out_TH[token_P[p]]
            for h in range(size):
                out_H[h] += y_PH[p, h]


@within
def route(x_TH: F32, own: Experts, told_Tk: I64, choices: Choices) -> None:
    """The k experts with the highest score + bias, the lowest among equals, or those that are told
    (-1: not told); their weights are their shares of the scores, scaled."""
    score_TE, expert_Tk, weight_Tk = choices
    num_experts, top_k = score_TE.shape[1], expert_Tk.shape[1]
    product(x_TH, own.gate_EH, score_TE, 0, 0)
    left_E = np.empty(num_experts, np.float32)
    for t in range(len(x_TH)):
        for e in range(num_experts):
            logit = max(score_TE[t, e], LOWEST)
            softplus = logit if logit > np.float32(20.0) else math.log1p(math.exp(logit))
            score_TE[t, e] = math.sqrt(softplus)
            left_E[e] = score_TE[t, e] + own.bias_E[e]
        total = np.float32(0.0)
        for j in range(top_k):
            best = 0
            for e in range(1, num_experts):
                if left_E[e] > left_E[best]:
                    best = e
            left_E[best] = np.float32(-np.inf)
            if len(told_Tk) and told_Tk[t, j] >= 0:
                best = told_Tk[t, j]
            expert_Tk[t, j] = best
            total += score_TE[t, best]
        for j in range(top_k):
            share = score_TE[t, expert_Tk[t, j]] / (total + np.float32(1e-20))
            weight_Tk[t, j] = share * np.float32(own.scaling)


@within
def _gated(gate_I: F32, up_I: F32, limit: float, weight: np.float32, out_I: F32) -> None:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) * weight."""
    most = np.float32(limit)
    for i in range(out_I.size):
        gate = min(gate_I[i], most)
        out_I[i] = gate * sigmoid(gate) * min(max(up_I[i], -most), most) * weight
