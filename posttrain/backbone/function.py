"""What every autograd function here shares."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.utils.generic import maybe_autocast


def plain_backward(backward: Any) -> Any:
    """`once_differentiable`, and autocast off: a caller's may still be on, though the forward's
    was not."""

    @once_differentiable
    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with maybe_autocast(device_type=grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return run
