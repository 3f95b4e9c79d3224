"""RMSNorm, x / rms(x) * weight, as one autograd function: a third of the passes over x that the
equation written out takes, forward and backward together.

Legend: T tokens (every axis but the last), C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone.again import form_again
from posttrain.backbone.function import plain_backward
from posttrain.backbone.host import use_host_loops


class RMSNorm(torch.autograd.Function):
    """x (..., C) -> (..., C); in float32 at least, the result in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
        out, scale = normed(x, weight_C, eps)
        ctx.save_for_backward(x, weight_C, scale)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_C, scale = ctx.saved_tensors
        if is_in_loops(x, weight_C):
            return *_backward_in_loops(grads[0], x, weight_C, scale), None
        wide, grad = x.to(scale.dtype), grads[0].to(scale.dtype)
        product, grad_weight_C = grad * wide, None
        if weight_C is None:
            along, grad_x = product.sum(-1, keepdim=True), grad * scale
        else:
            along = (product @ weight_C.to(scale.dtype)).unsqueeze(-1)
            grad_x = (grad * weight_C).mul_(scale)
            grad_weight_C = scale.flatten() @ product.flatten(0, -2)
        grad_x.addcmul_(wide, along.mul_(scale.pow(3)).div_(-x.shape[-1]))
        return grad_x.to(x.dtype), grad_weight_C, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x), (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(x: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    """`RMSNorm`; without gradients its equation alone, for the graph's bookkeeping takes as long as
    the norm of a few tokens."""
    if torch.is_grad_enabled():
        out: Any = RMSNorm.apply(x, weight_C, eps)
        if weight_C is not None:
            form_again(out, lambda x, weight_C: normed(x, weight_C, eps)[0], x, weight_C)
        return out
    return normed(x, weight_C, eps)[0]


def normed(x: Tensor, weight_C: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms(x), (..., 1)."""
    if is_in_loops(x, weight_C):
        return _in_loops(x, weight_C, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = inverse_rms(wide, eps)
    out = wide * scale
    return (out if weight_C is None else out.mul_(weight_C)).to(x.dtype), scale


def is_in_loops(x: Tensor, weight_C: Tensor | None) -> bool:
    return weight_C is not None and weight_C.dtype == x.dtype and use_host_loops(x)


def _in_loops(x: Tensor, weight_C: Any, eps: float) -> tuple[Tensor, Tensor]:
    from posttrain.backbone.host import rows  # imports numba
    from posttrain.backbone.host.parts import in_parts

    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
    x_TC, out_TC, scale_T = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), scale.view(-1)
    given = x_TC, weight_C.contiguous(), eps, out_TC, scale_T
    in_parts(rows.norm, len(x_TC), 4 * x.shape[-1], *given)
    return out, scale


def _backward_in_loops(
    grad: Tensor, x: Tensor, weight_C: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients at x and at the weight, whose sums over blocks of tokens are added in order."""
    from posttrain.backbone.host import rows  # imports numba
    from posttrain.backbone.host.parts import in_parts, num_blocks

    grad, x = grad.contiguous(), x.contiguous()
    grad_x, size = torch.empty_like(x), x.shape[-1]
    grad_TC, x_TC, grad_x_TC = (a.view(-1, size) for a in (grad, x, grad_x))
    sum_AC = x.new_empty(num_blocks(len(x_TC)), size)
    given = grad_TC, x_TC, weight_C.contiguous(), scale.view(-1), grad_x_TC, sum_AC
    in_parts(rows.norm_backward, len(x_TC), 8 * size, *given)
    return grad_x, sum_AC.sum(0)


class V4RMSNorm(stock.DeepseekV4RMSNorm):
    """Stock's parameter."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return rms_norm(x, self.weight, self.variance_epsilon)


class V4UnweightedRMSNorm(stock.DeepseekV4UnweightedRMSNorm):
    """Of each head's queries."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


def take_own_norms(module: nn.Module) -> None:
    """Put these in the place of the norms that stock's constructors have made within `module`."""
    for parent in list(module.modules()):
        for name, norm in parent.named_children():
            if type(norm) is stock.DeepseekV4RMSNorm:
                setattr(parent, name, V4RMSNorm(norm.weight.numel(), norm.variance_epsilon))
            elif type(norm) is stock.DeepseekV4UnweightedRMSNorm:
                setattr(parent, name, V4UnweightedRMSNorm(norm.eps))
