"""What a training step does to each row by itself: experts.py's SwiGLU and norm.py's RMSNorm, and
their gradients; against these they are tested.

Legend: R rows, I channels, X columns that hold them; T tokens, C channels, A blocks of tokens.
"""

from __future__ import annotations

import numpy as np

from posttrain.backbone.host.loops import loop
from posttrain.backbone.host.sinkhorn import BLOCK
from posttrain.backbone.host.sums import F32, inverse_rms, sigmoid


@loop
def swiglu(
    first: int,
    end: int,
    gate_RX: F32,
    up_RX: F32,
    up_from: int,
    weight_R: F32,
    limit: float,
    out_RI: F32,
) -> None:
    """silu(min(gate, limit)) clamp(up, -limit, limit) weight; where there are no weights, 1. A
    row of up begins at `up_from`."""
    size, most = out_RI.shape[1], np.float32(limit)
    for r in range(first, end):
        gate_I, up_I, out_I = gate_RX[r, :size], up_RX[r, up_from : up_from + size], out_RI[r]
        weight = weight_R[r] if len(weight_R) else np.float32(1.0)
        for i in range(size):
            gate = min(gate_I[i], most)
            out_I[i] = gate * sigmoid(gate) * min(max(up_I[i], -most), most) * weight


@loop
def swiglu_backward(
    first: int,
    end: int,
    grad_RI: F32,
    gate_RX: F32,
    up_RX: F32,
    up_from: int,
    weight_R: F32,
    limit: float,
    grad_gate_RX: F32,
    grad_up_RX: F32,
    grad_weight_R: F32,
    out_RI: F32,
) -> None:
    """The gradients, and `swiglu` again; nothing passes where a clamp cut."""
    size, most = out_RI.shape[1], np.float32(limit)
    one, nothing = np.float32(1.0), np.float32(0.0)
    share_I, along_I = np.empty(size, np.float32), np.empty(size, np.float32)
    for r in range(first, end):
        gate_I, up_I, out_I = gate_RX[r, :size], up_RX[r, up_from : up_from + size], out_RI[r]
        grad_I, grad_gate_I = grad_RI[r], grad_gate_RX[r, :size]
        grad_up_I = grad_up_RX[r, up_from : up_from + size]
        weight = weight_R[r] if len(weight_R) else one
        for i in range(size):
            gate = min(gate_I[i], most)
            share_I[i] = sigmoid(gate)
            silu = gate * share_I[i]
            out = silu * min(max(up_I[i], -most), most)
            along_I[i] = grad_I[i] * out
            out_I[i] = out * weight
            passed = grad_I[i] if abs(up_I[i]) <= most else nothing
            grad_up_I[i] = passed * silu * weight
        for i in range(size):
            gate, share = min(gate_I[i], most), share_I[i]
            passed = grad_I[i] if gate_I[i] <= most else nothing
            slope = share + gate * share * (one - share)
            grad_gate_I[i] = passed * slope * min(max(up_I[i], -most), most) * weight
        if len(weight_R):
            along = nothing
            for i in range(size):
                along += along_I[i]
            grad_weight_R[r] = along


@loop
def norm(
    first: int, end: int, x_TC: F32, weight_C: F32, eps: float, out_TC: F32, scale_T: F32
) -> None:
    """x / rms(x) * weight, and 1 / rms(x)."""
    for t in range(first, end):
        x_C, out_C = x_TC[t], out_TC[t]
        scale = inverse_rms(x_C, eps)
        for c in range(x_C.size):
            out_C[c] = x_C[c] * scale * weight_C[c]
        scale_T[t] = scale


@loop
def norm_backward(
    first: int,
    end: int,
    grad_TC: F32,
    x_TC: F32,
    weight_C: F32,
    scale_T: F32,
    grad_x_TC: F32,
    sum_AC: F32,
) -> None:
    """The gradient at x, and each block's sum of weight's."""
    for start in range(first, end, BLOCK):
        sum_C = sum_AC[start // BLOCK]
        sum_C[:] = np.float32(0.0)
        for t in range(start, min(start + BLOCK, end)):
            grad_C, x_C, out_C, scale = grad_TC[t], x_TC[t], grad_x_TC[t], scale_T[t]
            along = np.float32(0.0)
            for c in range(x_C.size):
                along += grad_C[c] * x_C[c] * weight_C[c]
            for c in range(x_C.size):
                sum_C[c] += grad_C[c] * x_C[c] * scale
            along *= scale * scale / np.float32(x_C.size)
            for c in range(x_C.size):
                out_C[c] = (grad_C[c] * weight_C[c] - along * x_C[c]) * scale
