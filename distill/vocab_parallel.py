"""A micro-batch's loss where each learner rank has its rows of every head, of all ranks' tokens.

    each rank's tokens, teachers by teachers ──> gathered ──> reverse KL, group=all ──> each its own

Where a rank has no token of a group's teachers it takes part with none. Shapes: M loss tokens of
this rank, N of all, n teachers, V vocabulary (this rank's rows), H hidden size.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.batch import Group, MicroBatch
from distill.causal_lm import token_logits
from distill.mesh import Mesh
from distill.reverse_kl import Head, ReverseKL, reverse_kl
from distill.reverse_kl_group import Tokens, all_reduce


def compare_over_ranks(
    hidden_MH: Tensor,
    head: Head,
    batch: MicroBatch,
    weight_M: Tensor,
    *,
    heads_of: Callable[[Sequence[str]], list[Head]],
    temperature: float,
    mesh: Mesh,
) -> tuple[Tensor, list[ReverseKL]]:
    """The loss of all ranks' tokens, and of this rank's what there is to know, group by group of
    `batch`. All ranks call this. Raises FloatingPointError on all of them."""
    own = {group.teachers: group for group in batch.groups}
    kinds = {names: [(x.shape[1], x.dtype) for x in group.hidden] for names, group in own.items()}
    found: dict[tuple[str, ...], ReverseKL] = {}
    losses: list[Tensor] = []
    for names, kind in mesh.merged(kinds).items():
        group = own.get(names) or empty_group(names, kind, hidden_MH.device)
        tokens = Tokens(weight_M[group.tokens], mesh.group)
        hidden = [tokens.gather(x) for x in group.hidden]
        kl = reverse_kl(
            tokens.gather(hidden_MH[group.tokens]),
            head,
            list(zip(hidden, heads_of(names), strict=True)),
            mixture=tokens.gather(group.mixture_Nn),
            row_weight=tokens.gather(weight_M[group.tokens]),
            temperature=temperature,
            group=mesh.group,
        )
        losses.append(kl.loss)
        values = (kl.per_token, kl.entropy, kl.per_teacher, kl.logsumexp)
        found[names] = ReverseKL(kl.loss, *(tokens.scatter(x) for x in values))
    return torch.stack(losses).sum(), [found[group.teachers] for group in batch.groups]


def empty_group(
    names: tuple[str, ...], kind: Sequence[tuple[int, torch.dtype]], device: torch.device
) -> Group:
    """No tokens of these teachers, each of a hidden size and a dtype."""
    hidden = [torch.zeros(0, width, dtype=dtype, device=device) for width, dtype in kind]
    mixture_Nn = torch.zeros(0, len(names), dtype=torch.float64, device=device)
    return Group(names, slice(0, 0), mixture_Nn, hidden)


@torch.no_grad()
def logits_over_ranks(
    hidden_MH: Tensor, head: Head, token_M: Tensor, rows: slice, mesh: Mesh
) -> Tensor:
    """The logits of one token of each row, (M,): each is computed by the rank that has its row of
    the head; `rows` are this one's. All ranks call this."""
    tokens = Tokens(token_M, mesh.group)
    token_N, hidden_NH = tokens.gather(token_M), tokens.gather(hidden_MH)
    is_own_N = (token_N >= rows.start) & (token_N < rows.stop)
    logit_N = hidden_NH.new_zeros(len(token_N))
    logit_N[is_own_N] = token_logits(hidden_NH[is_own_N], head, token_N[is_own_N] - rows.start)
    all_reduce(logit_N, mesh.group)
    return tokens.scatter(logit_N)
