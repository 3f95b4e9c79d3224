"""The learner's ranks: every distributed word of the training step.

    ddp     every rank holds the whole student; gradients are averaged
    fsdp2   every rank holds a part of it and of its optimizer, and gathers a layer at a time
    zero2   every rank holds the whole student and a part of its optimizer (DeepSpeed)
    zero3   as fsdp2 (DeepSpeed), but with the whole gradient until the step's end

Each averages gradients over the ranks, and this loss is a sum: it is multiplied by their number.
"""

import datetime
import os
import socket
import sys
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from posttrain.sharded import load_whole, load_whole_optimizer, shard_of, whole

if TYPE_CHECKING:
    from distill.zero import ZeroOptimizer

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
K = TypeVar("K")
V = TypeVar("V")


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
        leave()
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


def leave() -> None:
    """End the group, and what DeepSpeed has of it."""
    comm = sys.modules.get("deepspeed.comm")
    (comm if comm and comm.is_initialized() else dist).destroy_process_group()


def own_machine() -> str:
    """The same for processes that reach each other over loopback."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if boot.exists() and network.exists():  # containers have networks of their own
        return f"{boot.read_text()} {network.stat().st_ino}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def gloo_on_loopback() -> AbstractContextManager[None]:
    """Groups made inside listen on loopback, unless the user has named an interface."""
    found = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return environment(GLOO_SOCKET_IFNAME=found[0]) if found else nullcontext()


@contextmanager
def environment(**values: str) -> Generator[None]:
    """Variables of the process, where the user has not set them."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


class Mesh:
    """All ranks that learn together; on one rank a sum returns its argument."""

    def __init__(
        self, strategy: Strategy = "ddp", *, num_ranks: int = 1, vocab_parallel: bool = False
    ) -> None:
        """With several ranks they have met already; `vocab_parallel`: each has its rows of every
        head."""
        assert num_ranks == 1 or dist.get_world_size() == num_ranks
        self.size = num_ranks
        self.device = own_device()
        self.strategy = strategy if num_ranks > 1 else None
        self.is_sharded = self.strategy in ("fsdp2", "zero3")
        """Whether a rank holds a part of the student alone."""
        self.has_parts = self.strategy not in (None, "ddp")
        """Whether the student's or its optimizer's state is whole on no rank."""
        self._is_zero = self.strategy in ("zero2", "zero3")
        self.vocab_parallel = vocab_parallel and num_ranks > 1

    def prepare(
        self,
        student: nn.Module,
        units: Iterable[str],
        make_optimizer: Callable[[], Optimizer],
        *,
        head: nn.Module,
    ) -> tuple[nn.Module, "Optimizer | ZeroOptimizer"]:
        """The student on this rank's device, its gradients averaged over the ranks, and its
        optimizer, made once its parameters are what they stay; `units` names the classes of the
        layers that are gathered one at a time, and `head` is the one that with `vocab_parallel` is
        never gathered."""
        student = student.to(self.device)
        if self.strategy == "ddp":
            # parameters without a gradient (V4's indexer) would make a second step wait for ever
            student = DistributedDataParallel(student, find_unused_parameters=True)
        if self.strategy == "fsdp2":
            mesh, names = init_device_mesh(self.device.type, (self.size,)), set(units)
            for module in list(student.modules()):
                if type(module).__name__ in names or (module is head and self.vocab_parallel):
                    fully_shard(module, mesh=mesh)
            fully_shard(student, mesh=mesh)
        if self._is_zero:
            return self._prepare_zero(student, set(units), make_optimizer())
        return student, make_optimizer()

    def _prepare_zero(
        self, student: nn.Module, units: set[str], optimizer: Optimizer
    ) -> tuple[nn.Module, "ZeroOptimizer"]:
        from distill.zero import ZeroOptimizer  # DeepSpeed, which not every machine has

        stage = 2 if self.strategy == "zero2" else 3
        machines = self.union([own_machine()])
        with (
            gloo_on_loopback() if len(machines) == 1 else nullcontext(),  # it makes groups
            self._as_launched(),
        ):
            cut = ZeroOptimizer(student, optimizer, stage=stage, units=units)
        return cut.engine, cut

    def _as_launched(self) -> AbstractContextManager[None]:
        """What DeepSpeed looks for, and accelerate would take for a launch of its own."""
        device = torch.cuda.current_device() if self.device.type == "cuda" else 0
        return environment(LOCAL_RANK=str(device))

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
        return list(self.merged(dict.fromkeys(names)))

    def merged(self, found: Mapping[K, V]) -> dict[K, V]:
        """What all ranks have found, sorted; what several have is the same."""
        every: list[Any] = [dict(found)]
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, dict(found))
        return dict(sorted({key: x for own in every for key, x in own.items()}.items()))

    @property
    def group(self) -> dist.ProcessGroup:
        """All ranks, where they are several."""
        group = dist.group.WORLD
        assert group is not None
        return group

    def own_rows(self, num_rows: int) -> slice:
        """This rank's rows of a head with so many, if it is one of several that share heads out."""
        if not self.vocab_parallel:
            return slice(0, num_rows)
        return shard_of(num_rows, dist.get_rank(), self.size)

    @contextmanager
    def one_sum(self, optimizer: Any) -> Generator[None]:
        """Around all micro-batches of a step."""
        if not self._is_zero:
            yield
            return
        with self._as_launched(), optimizer.one_sum():
            yield

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

    def clip_grad_norm(self, student: nn.Module, optimizer: Any, max_norm: float) -> Tensor:
        """The global gradient norm before it was scaled down to `max_norm`."""
        if self._is_zero:
            return optimizer.clip_grad_norm(max_norm)
        return whole(nn.utils.clip_grad_norm_(student.parameters(), max_norm))

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A student's state, whole; where it is in parts all ranks call this."""
        if self._is_zero:
            from distill.zero import whole_weights

            return whole_weights(model)
        return whole(model.state_dict())

    def state(self, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Its and its optimizer's, whole; where there are parts all ranks call this."""
        return {"model": self.weights(model), "optimizer": whole(optimizer.state_dict())}

    def load(self, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        """Go on from a `state`, of which each rank has the whole."""
        if self._is_zero:
            optimizer.load_weights(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
        else:
            load_whole(model, state["model"])
            load_whole_optimizer(optimizer, state["optimizer"])
