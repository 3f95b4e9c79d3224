"""A teacher's weights over the ranks of a pool: FSDP2, one unit a layer.

Each rank keeps its rows of every parameter and gathers one layer at a time, so that a teacher takes
1/R of its size on each of R ranks, and a layer's whole size besides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill.mesh import meet as meet_ranks


def meet(place: Path, *, rank: int, num_ranks: int, device: str, timeout_s: float) -> DeviceMesh:
    """Wait at the file `place`, which no earlier group may have used, for all ranks: their mesh.

    A process is a rank of one group; that of an earlier pool in it ends. Raises RuntimeError where
    it is a rank of something else.
    """
    if dist.is_initialized() and _Ours.mesh is None:
        raise RuntimeError(
            "a worker of a pool of several must be no rank of anything else, and this process "
            "is: give the run a worker more, or set distill.num_teacher_workers to 1"
        )
    meet_ranks(place, rank=rank, num_ranks=num_ranks, timeout_s=timeout_s, device=device)
    _Ours.mesh = init_device_mesh(torch.device(device).type, (num_ranks,))
    return _Ours.mesh


class _Ours:
    """This process's mesh, where a pool made one: torch holds one default group a process."""

    mesh: DeviceMesh | None = None


def shard(model: Any, mesh: DeviceMesh, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard the base model's parameters, still empty, by rows; this rank's `tensors` as what they
    can be assigned from. The head stays as it is. No rank waits for another."""
    units: list[str] = list(model._no_split_modules or ())
    for module in model.base_model.modules():
        if type(module).__name__ in units:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.base_model, mesh=mesh, reshard_after_forward=True)
    state: dict[str, Tensor] = model.state_dict()
    return {name: _placed(tensor, state[name]) for name, tensor in tensors.items()}


def _placed(rows: Tensor, wanted: Tensor) -> Tensor:
    """This rank's rows as the distributed tensor that is wanted; a buffer as it is."""
    if not isinstance(wanted, DTensor):
        return rows
    return DTensor.from_local(
        rows,
        wanted.device_mesh,
        wanted.placements,
        run_check=False,
        shape=wanted.shape,
        stride=wanted.stride(),
    )
