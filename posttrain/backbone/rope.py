"""Interleaved RoPE on the last channels of a head (V4 report 2.3.3): pairs (2i, 2i+1) turn by
position * theta_i."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.function import plain_backward
from posttrain.backbone.norm import inverse_rms


def rotations(inv_freq: Tensor, positions: Tensor, scaling: float) -> Tensor:
    """Complex unit rotations (*positions, r/2) for the r rotated channels, complex64."""
    angle = positions[..., None].float() * inv_freq.to(positions.device, torch.float32)
    return torch.polar(torch.full_like(angle, scaling), angle)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the last 2 * rotation.shape[-1] channels of x; `rotation` broadcasts against x's other
    axes."""
    return Rotate.apply(x, rotation)  # pyright: ignore[reportReturnType]


class Rotate(torch.autograd.Function):
    """A copy of x, turned in place; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return turned(x, rotation)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rotation,) = ctx.saved_tensors
        return turned(grads[0], rotation.conj()), None


class NormAndRotate(torch.autograd.Function):
    """x / rms(x), turned, (..., C): keeps its result alone, which attention keeps as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = inverse_rms(wide, eps)
        out = turn_(wide * scale, rotation).to(x.dtype)
        ctx.save_for_backward(out, scale, rotation)
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, scale, rotation = ctx.saved_tensors
        back = rotation.to(torch.promote_types(scale.dtype, torch.complex64)).reciprocal()
        normed = turned(out.to(scale.dtype), back)
        grad_x = turned(grads[0].to(scale.dtype), rotation.conj())
        along = (grad_x * normed).mean(-1, keepdim=True)
        return grad_x.addcmul_(normed, along, value=-1).mul_(scale).to(out.dtype), None, None


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    return turn_(x.clone(memory_format=torch.contiguous_format), rotation)


def turn_(x: Tensor, rotation: Tensor) -> Tensor:
    """x itself, its last channels turned."""
    part = x[..., x.shape[-1] - 2 * rotation.shape[-1] :]
    pairs = part.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(rotation)
    if x.dtype != pairs.dtype:  # else `pairs` is a view of x
        part.copy_(pairs.flatten(-2))
    return x
