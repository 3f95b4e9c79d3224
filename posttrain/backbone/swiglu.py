"""The experts' SwiGLU, its gate and up clamped: silu(min(gate, limit)) * clamp(up, -limit, limit).

Legend: T tokens, R rows sorted by expert, I channels, J = 2 I: gate, then up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.again import form_again
from posttrain.backbone.function import plain_backward
from posttrain.backbone.host import use_host_loops


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.clamp(max=limit), inplace=True).mul_(up.clamp(-limit, limit))


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float, *, out: Sequence[Tensor]
) -> None:
    """The gradients at `gate` and `up` into `out`; nothing passes where a clamp cut."""
    cut = gate.clamp(max=limit)
    out[1].copy_(within(F.silu(cut).mul_(grad), up, -limit, limit))
    through = torch.ops.aten.silu_backward(up.clamp(-limit, limit).mul_(grad), cut)
    out[0].copy_(within(through, gate, -math.inf, limit))


def within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low <= x <= high, 0 elsewhere, in one pass: masks are ten times as slow on CPU.
    The operator's own bounds are left out, so they move by the last bit."""
    more = 1 + torch.finfo(torch.float32).eps
    return torch.ops.aten.hardtanh_backward(grad, x, low * more, high * more)


def weighted(gate_up_RJ: Tensor, weight_R: Tensor, limit: float) -> Tensor:
    """swiglu * weight, (R, I)."""
    if use_host_loops(gate_up_RJ):
        return _in_loops(gate_up_RJ, gate_up_RJ, weight_R, limit)
    gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
    return swiglu(gate_RI, up_RI, limit).mul_(weight_R.unsqueeze(1))


def weighted_backward(
    grad_RI: Tensor, gate_up_RJ: Tensor, weight_R: Tensor, limit: float
) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """`weighted` again, the gradient at the weights, and what gives that at gate and up, when
    memory is free for it. `grad` is spent."""
    if use_host_loops(gate_up_RJ):
        grad_RJ = torch.empty_like(gate_up_RJ)
        given = grad_RI, gate_up_RJ, gate_up_RJ, weight_R, limit, grad_RJ, grad_RJ
        hidden_RI, grad_weight_R = _backward_in_loops(*given)
        return hidden_RI, grad_weight_R, lambda: grad_RJ
    gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
    hidden_RI = swiglu(gate_RI, up_RI, limit)
    grad_weight_R = (grad_RI * hidden_RI).sum(-1, dtype=weight_R.dtype)

    def through() -> Tensor:
        grad_RJ = torch.empty_like(gate_up_RJ)
        weighted_RI, out = grad_RI.mul_(weight_R.unsqueeze(1)), grad_RJ.chunk(2, dim=1)
        swiglu_backward(weighted_RI, gate_RI, up_RI, limit, out=out)
        return grad_RJ

    return hidden_RI.mul_(weight_R.unsqueeze(1)), grad_weight_R, through


def shared(gate_TI: Tensor, up_TI: Tensor, limit: float) -> Tensor:
    """`swiglu` of the shared expert, whose projections stay modules that adapters can wrap; without
    gradients what the autograd function gives."""
    if torch.is_grad_enabled():
        out_TI = cast("Tensor", SwiGLU.apply(gate_TI, up_TI, limit))
        form_again(out_TI, lambda gate, up: _shared(gate, up, limit), gate_TI, up_TI)
        return out_TI
    return _shared(gate_TI, up_TI, limit)


def _shared(gate_TI: Tensor, up_TI: Tensor, limit: float) -> Tensor:
    if use_host_loops(gate_TI):
        return _in_loops(gate_TI, up_TI, gate_TI.new_empty(0), limit)
    return swiglu(gate_TI, up_TI, limit)


class SwiGLU(torch.autograd.Function):
    """`swiglu`, keeping its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.limit = limit
        return _shared(gate_TI, up_TI, limit)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_TI, up_TI = (x.contiguous() for x in ctx.saved_tensors)
        out = torch.empty_like(gate_TI), torch.empty_like(up_TI)
        if use_host_loops(gate_TI):
            no_weights = gate_TI.new_empty(0)
            _backward_in_loops(grads[0], gate_TI, up_TI, no_weights, ctx.limit, *out)
        else:
            swiglu_backward(grads[0], gate_TI, up_TI, ctx.limit, out=out)
        return *out, None


def _in_loops(gate: Tensor, up: Tensor, weight_R: Tensor, limit: float) -> Tensor:
    """swiglu * weight; `gate` and `up` may be one tensor (R, J)."""
    from posttrain.backbone.host import rows  # imports numba
    from posttrain.backbone.host.parts import in_parts

    size = gate.shape[1] // 2 if gate is up else gate.shape[1]
    out_RI, up_from = gate.new_empty(len(gate), size), up.shape[1] - size
    gate, up = gate.contiguous(), up.contiguous()
    in_parts(rows.swiglu, len(gate), 16 * size, gate, up, up_from, weight_R, limit, out_RI)
    return out_RI


def _backward_in_loops(
    grad_RI: Tensor,
    gate: Tensor,
    up: Tensor,
    weight_R: Tensor,
    limit: float,
    grad_gate: Tensor,
    grad_up: Tensor,
) -> tuple[Tensor, Tensor]:
    """`_in_loops` again, and the weights' gradient; gate's and up's go where they are given."""
    from posttrain.backbone.host import rows  # imports numba
    from posttrain.backbone.host.parts import in_parts

    grad_RI = grad_RI.contiguous()
    out_RI, grad_weight_R = torch.empty_like(grad_RI), torch.empty_like(weight_R)
    up_from = up.shape[1] - grad_RI.shape[1]
    inputs = grad_RI, gate, up, up_from, weight_R, limit, grad_gate, grad_up, grad_weight_R, out_RI
    in_parts(rows.swiglu_backward, len(gate), 32 * grad_RI.shape[1], *inputs)
    return out_RI, grad_weight_R
