"""The reverse KL over a process group: every rank has all tokens and some rows of the heads.

A group that also shares out the data gathers its tokens first: `Tokens(hidden, group)` knows
how many each rank has, gathers what belongs to them, and gives a rank its own again.

Shapes: N tokens of all ranks, M of this one, V vocabulary (this rank's part).
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """(ranks, *x.shape), the same on all ranks; one collective. Without a group (1, *x.shape)."""
    if group is None:
        return x[None]
    every = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, x.contiguous(), group=group)
    return torch.stack(every)


def all_reduce(x: Tensor, group: ProcessGroup | None) -> None:
    """x, summed over the ranks in place."""
    if group is not None:
        dist.all_reduce(x, group=group)


def agree(
    hidden_NH: Tensor, weight_VH: Tensor, num_teachers: int, group: ProcessGroup | None
) -> int:
    """The longest part of the vocabulary, by which all ranks cut their tiles; raises ValueError on
    all of them if they differ in their numbers of tokens or of teachers."""
    own = torch.tensor([len(weight_VH), len(hidden_NH), num_teachers], device=hidden_NH.device)
    if group is None:
        return len(weight_VH)
    every = all_gather(own, group)
    for name, found in zip(("tokens", "teachers"), every.T[1:].tolist(), strict=True):
        if len(set(found)) > 1:
            raise ValueError(
                f"the ranks of the group have {found} {name}: all need the same ones; "
                "reverse_kl_group.Tokens gathers them"
            )
    return int(every[:, 0].max())


class Tokens:
    """Tokens that the ranks of a group have, any number each (0 too); all in the order of ranks."""

    def __init__(self, like: Tensor, group: ProcessGroup) -> None:
        """`like`: a tensor with as many rows as this rank has tokens; all ranks call this."""
        self.group = group
        num = torch.tensor([len(like)], device=like.device)
        self.counts: list[int] = all_gather(num, group)[:, 0].tolist()
        start = sum(self.counts[: dist.get_rank(group)])
        self.own = slice(start, start + len(like))

    def gather(self, x_M: Tensor) -> Tensor:
        """All ranks' (N, ...). Its gradient must be the same on all ranks, as that of a loss which
        all of them compute over the group is: each takes its own rows of it, nothing is summed."""
        gathered: Any = _Gather.apply(x_M, self)
        return gathered

    def scatter(self, x_N: Tensor) -> Tensor:
        """This rank's rows (M, ...) of what all ranks have: of per_token, say."""
        return x_N[self.own]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_M: Tensor, tokens: Tokens) -> Tensor:
        ctx.own = tokens.own
        padded = x_M.new_zeros(max(tokens.counts), *x_M.shape[1:])
        padded[: len(x_M)] = x_M
        every = all_gather(padded, tokens.group)
        return torch.cat([x[:count] for x, count in zip(every, tokens.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's type
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        return grad_outputs[0][ctx.own], None
