"""The learner's ranks, behind accelerate: every distributed word of the training step."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn


class Mesh:
    """All ranks that learn together; on one rank a sum returns its argument."""

    def __init__(self) -> None:
        # parameters without a gradient (V4's indexer) would make a second step wait for ever
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        # named here, since accelerate would read it from the environment
        self._accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._accelerator.num_processes

    def prepare(
        self, student: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both on this rank's device, the student's gradients averaged over the ranks."""
        return self._accelerator.prepare(student, optimizer)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, element by element."""
        if self.size == 1:
            return tensor
        total: Any = self._accelerator.reduce(tensor, reduction="sum")
        return total

    def union(self, names: Iterable[str]) -> list[str]:
        """Those of all ranks, sorted."""
        own = sorted(set(names))
        return sorted(set(gather_object(own))) if self.size > 1 else own

    def accumulate(self, student: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients travel with the last one alone."""
        return nullcontext() if is_last else self._accelerator.no_sync(student)

    def backward(self, loss: Tensor) -> None:
        """Of a loss that is a sum over ranks, where accelerate averages gradients over them."""
        self._accelerator.backward(loss * self.size)

    def clip_grad_norm(self, student: nn.Module, max_norm: float) -> Tensor:
        """The global gradient norm before it was scaled down to `max_norm`."""
        norm = self._accelerator.clip_grad_norm_(student.parameters(), max_norm)
        assert isinstance(norm, Tensor)
        return norm
