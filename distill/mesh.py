"""The learner's ranks: every distributed word of the training step.

    ddp     every rank holds the whole student; gradients are averaged
    fsdp2   every rank holds a part of it and of its optimizer, and gathers a layer at a time

Either averages gradients over the ranks, and this loss is a sum: it is multiplied by their number.
"""

import datetime
import os
import socket
import uuid
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from posttrain.sharded import whole

Strategy = Literal["ddp", "fsdp2"]


def own_device() -> torch.device:
    """A GPU where this process has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def meet(
    place: Path, *, rank: int, num_ranks: int, timeout_s: float, device: str | None = None
) -> None:
    """Wait at the file `place`, which no earlier group may have used, for all ranks. A group that
    an earlier stage left in this process ends. The device is a GPU where there is one. On one
    machine gloo talks over loopback, whatever the machine's name is."""
    device = device or own_device().type
    if dist.is_initialized():
        dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=timeout_s)
    store: Any = dist.FileStore(str(place), num_ranks)  # pyright: ignore[reportPrivateImportUsage]  # documented
    store.set_timeout(timeout)
    store.set(f"machine/{rank}", own_machine())
    machines = {store.get(f"machine/{other}") for other in range(num_ranks)}
    with gloo_on_loopback() if len(machines) == 1 else nullcontext():
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=timeout,
        )


def own_machine() -> str:
    """The same for processes that reach each other over loopback."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if boot.exists() and network.exists():  # containers have networks of their own
        return f"{boot.read_text()} {network.stat().st_ino}"
    return f"{socket.gethostname()} {uuid.getnode()}"


@contextmanager
def gloo_on_loopback() -> Generator[None]:
    """Groups made inside listen on loopback, unless the user has named an interface."""
    found = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if not found or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = found[0]
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


class Mesh:
    """All ranks that learn together; on one rank a sum returns its argument."""

    def __init__(self, strategy: Strategy = "ddp", *, num_ranks: int = 1) -> None:
        """With several ranks they have met already."""
        assert num_ranks == 1 or dist.get_world_size() == num_ranks
        self.size = num_ranks
        self.device = own_device()
        self.is_sharded = num_ranks > 1 and strategy == "fsdp2"

    def prepare(self, student: nn.Module, units: Iterable[str]) -> nn.Module:
        """The student on this rank's device, its gradients averaged over the ranks; `units` names
        the classes of the layers that are gathered one at a time. Its parameters may be replaced:
        make the optimizer after this."""
        student = student.to(self.device)
        if self.size == 1:
            return student
        if not self.is_sharded:
            # parameters without a gradient (V4's indexer) would make a second step wait for ever
            return DistributedDataParallel(student, find_unused_parameters=True)
        mesh, names = init_device_mesh(self.device.type, (self.size,)), set(units)
        for module in list(student.modules()):
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh)
        fully_shard(student, mesh=mesh)
        return student

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, element by element."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of all ranks'."""
        return int(self._reduce(torch.tensor(number, device=self.device), dist.ReduceOp.MAX))

    def largest(self, tensor: Tensor) -> Tensor:
        """Over all ranks, element by element."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, operation)
        return tensor

    def union(self, names: Iterable[str]) -> list[str]:
        """Those of all ranks, sorted."""
        every: list[Any] = [list(names)]
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, list(names))
        return sorted({name for found in every for name in found})

    def accumulate(self, student: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients travel with the last one alone."""
        if isinstance(student, FSDPModule):
            student.set_requires_gradient_sync(is_last)
        if isinstance(student, DistributedDataParallel) and not is_last:
            return student.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Of a loss that is a sum over ranks."""
        (loss * self.size).backward()

    def clip_grad_norm(self, student: nn.Module, max_norm: float) -> Tensor:
        """The global gradient norm before it was scaled down to `max_norm`."""
        return whole(nn.utils.clip_grad_norm_(student.parameters(), max_norm))
