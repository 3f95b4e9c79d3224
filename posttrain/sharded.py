"""Tensors that lie in parts on several ranks (DTensor): gathered, and cut again."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Any) -> Any:
    """A tensor with all its parts, or a state with such tensors at any depth; all ranks call this.
    What is not in parts is returned as it is."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, in the parts that `like` is in; nothing is sent."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    device = like.to_local().device
    return distribute_tensor(
        value.to(device), like.device_mesh, like.placements, src_data_rank=None
    )


@torch.no_grad()
def load_whole(model: Any, state: dict[str, Tensor]) -> None:
    """A model's state that `whole` gave, back into a model that may be in parts."""
    own = model.state_dict()
    assert own.keys() == state.keys(), "the state of another model"
    for name, tensor in own.items():
        tensor.copy_(cut_like(state[name], tensor))


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The same of an optimizer's state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        i: {
            key: cut_like(value, params[i])
            if isinstance(value, Tensor) and value.shape == params[i].shape
            else value
            for key, value in values.items()
        }
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def shard_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows that FSDP2 gives a rank: ceil(rows / ranks) each, the last ranks fewer or none."""
    per_rank = -(-num_rows // num_ranks)
    return slice(min(rank * per_rank, num_rows), min((rank + 1) * per_rank, num_rows))
