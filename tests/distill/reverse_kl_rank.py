"""One rank of test_reverse_kl_group.py, which sets RANK and WORLD_SIZE: `python ... OUT`."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from test_reverse_kl import Problem, V
from torch import Tensor
from torch import distributed as dist

from distill.reverse_kl import Head, reverse_kl
from distill.reverse_kl_group import Tokens

CUTS = {1: (0, V), 2: (0, 11, V), 3: (0, 5, 5, V)}
"""Where the vocabulary is cut, for so many ranks; the second of three has none of it."""
TOKEN_CUTS = {1: (0, 13), 2: (0, 9, 13), 3: (0, 9, 9, 13)}
"""Where the tokens are; the second of three ranks has none."""


def main(out: Path) -> None:
    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = results(rank, num_ranks)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def results(rank: int, num_ranks: int) -> dict[str, Any]:
    """All that the test compares, of this rank."""
    part = slice(*CUTS[num_ranks][rank : rank + 2])
    tokens = slice(*TOKEN_CUTS[num_ranks][rank : rank + 2])
    return {
        **{f"{dtype}": solve(part, Problem(dtype)) for dtype in (torch.float64, torch.float32)},
        "first teacher": solve(part, Problem(), num_teachers=1),
        "frozen head": solve(part, Problem(), frozen=True),
        "no tokens": solve(part, Problem(num_rows=0)),
        "gathered": gathered(part, tokens),
        "errors": errors(part, rank),
    }


def solve(
    part: slice, problem: Problem, *, num_teachers: int = 3, frozen: bool = False
) -> dict[str, Tensor]:
    """Values, and gradients of the hidden states and of `part` of head and bias."""
    weight = problem.head.detach()[part].clone().requires_grad_(not frozen)
    bias = weight.detach().sum(dim=-1).requires_grad_(not frozen)
    group = dist.group.WORLD if dist.is_initialized() else None
    kl = reverse_kl(
        problem.hidden,
        Head(weight, bias, 0.9),
        [(hidden, head[part]) for hidden, head in problem.teachers[:num_teachers]],
        mixture=problem.mixture[:, :num_teachers],
        row_weight=problem.weight,
        temperature=0.8,
        group=group,
        tile_rows=4,
    )
    kl.loss.backward()
    found = {"per_token": kl.per_token, "entropy": kl.entropy, "per_teacher": kl.per_teacher}
    found["logsumexp"] = kl.logsumexp
    grads = {"hidden": problem.hidden.grad, "head": weight.grad, "bias": bias.grad}
    found |= {name: grad for name, grad in grads.items() if grad is not None}
    return {"loss": kl.loss.detach(), **found}


def gathered(part: slice, mine: slice) -> dict[str, Tensor]:
    """The same where this rank's data are the tokens `mine` alone."""
    problem = Problem()
    hidden = problem.hidden.detach()[mine].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    tokens = Tokens(hidden, group)
    kl = reverse_kl(
        tokens.gather(hidden),
        problem.head[part],
        [(tokens.gather(h[mine]), w[part]) for h, w in problem.teachers],
        mixture=tokens.gather(problem.mixture[mine]),
        row_weight=tokens.gather(problem.weight[mine]),
        group=group,
    )
    kl.loss.backward()
    assert hidden.grad is not None
    return {"hidden": hidden.grad, "per_token": tokens.scatter(kl.per_token)}


def errors(part: slice, rank: int) -> list[str]:
    """Of inputs that only one rank can see are wrong."""
    found: list[str] = []
    problem = Problem()
    problem.teachers[1][1][-1] = float("nan")  # in the last rank's part
    try:
        solve(part, problem)
    except FloatingPointError as error:
        found.append(str(error))
    try:
        solve(part, Problem(num_rows=13 if rank else 12))
    except ValueError as error:
        found.append(str(error))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
