"""Losses of the layers themselves (balance, indexer) that train under any trainer.

Trainers call the base model and build their own loss on its hidden states, so a layer cannot
return a loss of its own. It attaches it instead: `attach` is the identity on the hidden states,
and where a gradient comes back to them, whatever its size, each attached loss L_i gets

    dL_total / dL_i = scale.

Attach inside the layer that made the loss, to its output: then the loss lives and dies in that
layer's gradient checkpoint, of either kind. A loss that leaves a non-reentrant checkpoint and is
attached outside trains too, but keeps the layer's recomputed activations longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Attach(torch.autograd.Function):
    """Identity on the hidden states; `scale` to each loss on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scale: Tensor, *losses: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.kinds = [(loss.dtype, loss.device) for loss in losses]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        wanted = [
            scale.to(dtype=dtype, device=device) if is_needed else None
            for (dtype, device), is_needed in zip(ctx.kinds, ctx.needs_input_grad[2:], strict=True)
        ]
        return grads[0], None, *wanted


def attach(hidden: Tensor, losses: Sequence[Tensor], scale: float | Tensor) -> Tensor:
    """`hidden` again, of any shape, not to be changed in place; its backward also gives each scalar
    loss the gradient `scale`.

    Args:
        hidden: what the trainer's loss will be made from, wholly or in part. Where nothing comes
            back to it, the losses get nothing either.
        losses: scalars, each in the graph of its own parameters.
        scale: what the trainer does to its own loss before backward and this cannot see: 1 / n
            for a mean over n accumulated micro-batches, times a gradient scaler's factor. A
            tensor is read without a synchronisation.

    Raises:
        ValueError: a loss that is no scalar.
    """
    for i, loss in enumerate(losses):
        if loss.dim():
            raise ValueError(f"losses[{i}] is {tuple(loss.shape)}, attach takes scalars: sum it")
    if not losses:
        return hidden
    if not isinstance(scale, Tensor):  # filled on the device: a copy from the host would wait
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.full((), scale, dtype=dtype, device=hidden.device)
    return Attach.apply(hidden, scale, *losses)  # pyright: ignore[reportReturnType]


def scale_own_losses(model: Any, scale: float | Tensor) -> None:
    """Set the gradient of the losses that a causal model's own layers attach, each a mean over a
    forward's tokens: a micro-batch's share of its step's tokens, so that they add up to the step's
    mean. A model without such losses stays as it is."""
    if hasattr(model.base_model, "auxiliary_scale"):
        model.base_model.auxiliary_scale = scale


class Touch(torch.autograd.Function):
    """Identity on the hidden states; zeros to each parameter on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        zeros = [
            torch.zeros_like(p) if is_needed else None
            for p, is_needed in zip(ctx.saved_tensors, needed, strict=True)
        ]
        return grads[0], *zeros


def touch(hidden: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`hidden` again; its backward gives the parameters a gradient of zeros where nothing else
    does: a rank whose rows are too short for a compressor would keep the others waiting."""
    return Touch.apply(hidden, *parameters)  # pyright: ignore[reportReturnType]
