"""Losses of the layers themselves (balance, indexer) that train under any trainer.

Trainers call the base model and build their own loss on its hidden states, so a layer cannot
return a loss of its own. It attaches it instead: `attach` is the identity on the hidden states,
and where a gradient comes back to them, whatever its size, each attached loss L_i gets

    dL_total / dL_i = scale.

Attach inside the layer that made the loss, to its output: then the loss lives and dies in that
layer's gradient checkpoint, of either kind. A loss that leaves a non-reentrant checkpoint and is
attached outside trains too, but keeps the layer's recomputed activations longer.

Each loss is a mean over one forward's tokens. Where n forwards make a step, they are to add up to
the step's mean, so scale is 1 / n, and the base model has to know n. Only the training loop knows
it: transformers' Trainer divides its own loss where no model can see it and tells accelerate that
n is 1, TRL's trainers beside it. So a callback tells the model (`ScaleOwnLosses`), and it joins a
Trainer by itself (`join_trainers`); loops written with accelerate are asked (`step_share`); any
other loop says so itself (`scale_own_losses`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import has_length


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


def scale_own_losses(model: Any, scale: float | Tensor | None) -> None:
    """Set the gradient of the losses that a causal model's own layers attach, each a mean over a
    forward's tokens: a micro-batch's share of its step's tokens, so that they add up to the step's
    mean. None: 1 / n of the loop's n micro-batches (`step_share`), as a new model has it. Adapters
    and wrappers may be around it; a model without such losses stays as it is."""
    for module in model.modules():
        if "auxiliary_scale" in vars(module):  # a wrapper hands attributes on, to read alone
            module.auxiliary_scale = scale


def step_share(num_microbatches: int) -> float:
    """1 / n, with n what a Trainer said (`num_microbatches`) or what `accelerator.backward` divides
    by; never both: a Trainer sets accelerate's to 1, and a TRL loop that leaves the division to
    accelerate may yet call the Trainer's callbacks. Accelerate's n is of the process: a loop
    without it, after one that accumulated with it, says its own share (`scale_own_losses`)."""
    from accelerate.state import GradientState  # for training alone

    return 1 / max(num_microbatches, GradientState().num_steps)


class ScaleOwnLosses(TrainerCallback):
    """Tells the V4s in a Trainer's model how many micro-batches make a step. It is there without
    being passed where the model is a `V4ForCausalLM`; a model that merely holds one passes it:
    `callbacks=[ScaleOwnLosses()]`."""

    def __init__(self) -> None:
        self.bases: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        modules = kwargs["model"].modules()
        self.bases = [module for module in modules if "num_microbatches" in vars(module)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As the Trainer counts them: an epoch's last step may have fewer, which a loader without
        a length does not tell. Under fp16 the losses are scaled as the trainer's own is."""
        number = args.gradient_accumulation_steps
        loader = kwargs.get("train_dataloader")
        if has_length(loader):
            num_full, num_left = divmod(len(loader), number)
            if num_left and state.global_step % (num_full + 1) == num_full:
                number = num_left
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        self._tell(number, 1.0 if scaler is None else scaler.get_scale())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell(1, 1.0)  # here, not at the end of training, which an error may keep from coming

    def _tell(self, number: int, factor: float) -> None:
        for base in self.bases:
            base.num_microbatches, base.loss_factor = number, factor


def join_trainers() -> None:
    """Every Trainer made from now on has a `ScaleOwnLosses`, which leaves other models alone."""
    from transformers import trainer  # brings datasets and pandas: not for those who never train

    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if ScaleOwnLosses not in callbacks:
        callbacks.append(ScaleOwnLosses)


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
