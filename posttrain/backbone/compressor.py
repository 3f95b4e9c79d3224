"""CSA and HCA compressors (V4 report 2.3.1 eqs. 9-12, 2.3.2 eqs. 20-23): m tokens, one entry.

An entry is key and value at once.

HCA entry w: channel-wise softmax over its window's m gates. CSA entry w: over 2m slots, the
previous window's first series (Ca) and this window's second (Cb), so neighbouring entries overlap.
The first window has no previous one. Query t sees entry w iff w < (t + 1) // m; trailing tokens
make no entry.

Legend: D documents, L tokens, E entries, m compression rate, C channels of an entry, X projected
channels: C for HCA, 2C for CSA and its indexer (Ca, Cb side by side).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.function import plain_backward
from posttrain.backbone.rope import rotate


def compress(module: Any, kv_DLX: Tensor, gate_DLX: Tensor, rotation_E: Tensor) -> Tensor:
    """Entries (D, E, C), E = L // m, of whole documents, from projected values and gates.

    `rotation_E` (E, r/2) are the RoPE rotations of the windows' first positions."""
    bias_mX, is_overlapped = module.position_bias, is_overlapping(module, kv_DLX)
    pooled: Any = Pool.apply(kv_DLX, gate_DLX, bias_mX, is_overlapped)
    return rotate(module.kv_norm(pooled), rotation_E).to(kv_DLX.dtype)


class Pool(torch.autograd.Function):
    """Each window's values under its softmax, (D, E, C) in float32 at least; what lies between is
    formed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, kv_DLX: Tensor, gate_DLX: Tensor, bias_mX: Tensor, is_overlapped: bool
    ) -> Tensor:
        kv, weight = windows(kv_DLX, gate_DLX, bias_mX, is_overlapped=is_overlapped)
        pooled_DEC = kv.mul_(weight).sum(dim=2)
        ctx.save_for_backward(kv_DLX, gate_DLX, bias_mX, pooled_DEC)
        ctx.is_overlapped = is_overlapped
        return pooled_DEC

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kv_DLX, gate_DLX, bias_mX, pooled_DEC = ctx.saved_tensors
        kv, weight = windows(kv_DLX, gate_DLX, bias_mX, is_overlapped=ctx.is_overlapped)
        grad_kv = weight.mul_(grads[0].unsqueeze(2))
        grad_gate = kv.sub_(pooled_DEC.unsqueeze(2)).mul_(grad_kv)
        grad_kv, grad_gate = (
            overlap_backward(x) if ctx.is_overlapped else x for x in (grad_kv, grad_gate)
        )
        grad_bias_mX = grad_gate.sum(dim=(0, 1)).to(bias_mX.dtype)
        trailing = (0, 0, 0, kv_DLX.shape[1] - grad_kv.shape[1] * grad_kv.shape[2])
        grad_kv, grad_gate = (
            F.pad(x.flatten(1, 2), trailing).to(kv_DLX.dtype) for x in (grad_kv, grad_gate)
        )
        return grad_kv, grad_gate, grad_bias_mX, None


def windows(
    kv_DLX: Tensor, gate_DLX: Tensor, bias_mX: Tensor, *, is_overlapped: bool
) -> tuple[Tensor, Tensor]:
    """Every window's values and their softmax, (D, E, slots, C) each, not to be shared."""
    rate, wide = len(bias_mX), torch.promote_types(kv_DLX.dtype, torch.float32)
    num_entries = kv_DLX.shape[1] // rate
    kv, gate = (
        x[:, : num_entries * rate].unflatten(1, (num_entries, rate)).to(wide)
        for x in (kv_DLX, gate_DLX)
    )
    gate = gate + bias_mX
    if is_overlapped:
        return overlap(kv, 0.0), overlap(gate, float("-inf")).softmax(dim=2)
    return kv.clone(), gate.softmax(dim=2)


def compress_on(
    module: Any, kv_DNX: Tensor, gate_DNX: Tensor, start_D: Tensor, rotation_DE: Tensor
) -> Tensor:
    """Entries (D, E, C) that new tokens complete, after `start_D` tokens of each document.

    Args:
        kv_DNX, gate_DNX: projections of R tokens before the new ones (R = m for HCA, 2m for CSA),
            then of the new ones, oldest first; what stands before a document counts for nothing.
        rotation_DE: (D, E, r/2), of the windows' first positions; E is the most that any row
            completes, and what a row does not complete is not to be used.
    """
    rate, device = module.compress_rate, kv_DNX.device
    has_previous = is_overlapping(module, kv_DNX)
    num_before = 2 * rate if has_previous else rate
    slots = 2 * rate if has_previous else rate
    window_E = torch.arange(rotation_DE.shape[1], device=device) * rate
    slot = torch.arange(slots, device=device) - (slots - rate)
    # where each window's slots stand: the open window began start % m tokens before the new ones
    place_DEs = (num_before - start_D % rate)[:, None, None] + window_E[:, None] + slot
    is_real = place_DEs + (start_D[:, None, None] - num_before) >= 0
    place = place_DEs.clamp(max=kv_DNX.shape[1] - 1)
    row = torch.arange(len(kv_DNX), device=device)[:, None, None]
    kv, gate = kv_DNX[row, place].float(), gate_DNX[row, place].float()
    bias = module.position_bias
    if has_previous:
        size = module.head_dim
        kv, gate = (
            torch.cat([x[:, :, :rate, :size], x[:, :, rate:, size:]], dim=2) for x in (kv, gate)
        )
        bias = torch.cat([bias[:, :size], bias[:, size:]], dim=0)
    gate = (gate + bias).masked_fill(~is_real.unsqueeze(-1), float("-inf"))
    return finish(module, kv, gate, rotation_DE).to(kv_DNX.dtype)


def is_overlapping(module: Any, kv: Tensor) -> bool:
    """Whether projections (..., X) are of two series, as CSA's are."""
    return kv.shape[-1] == 2 * module.head_dim


def overlap(x_DEmX: Tensor, fill: float) -> Tensor:
    """(D, E, m, 2C) -> (D, E, 2m, C): the previous window's Ca in front of this window's Cb."""
    series_a, series_b = x_DEmX.chunk(2, dim=-1)
    first = torch.full_like(series_a[:, :1], fill)
    return torch.cat([torch.cat([first, series_a[:, :-1]], dim=1), series_b], dim=2)


def overlap_backward(grad_DEsC: Tensor) -> Tensor:
    """The gradient (D, E, m, 2C) before `overlap`; the last window's Ca are in no entry."""
    in_next, series_b = grad_DEsC.chunk(2, dim=2)
    series_a = F.pad(in_next[:, 1:], (0, 0, 0, 0, 0, min(1, in_next.shape[1])))
    return torch.cat([series_a, series_b], dim=-1)


def finish(module: Any, kv: Tensor, gate: Tensor, rotation: Tensor) -> Tensor:
    """Pool (..., slots, C) over its slots, normalise, rotate: (..., C)."""
    pooled = (kv * gate.softmax(dim=-2)).sum(dim=-2)
    return rotate(module.kv_norm(pooled), rotation)
