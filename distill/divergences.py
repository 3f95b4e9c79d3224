"""Divergences other than the full-vocabulary reverse KL: ablations, exact, not tuned for speed.

With p the student's and q_i teacher i's distribution of a token, at the temperature:

    forward_kl     sum_v q_v (log q_v - log p_v)
    jsd            beta KL(q || m) + (1 - beta) KL(p || m),    m = beta q + (1 - beta) p
    top_k          sum over the teacher's k likeliest v of p_v (log p_v - log q_v), not renormalised
    sampled_token  log p_a - log q_a of the token a that was sampled from p: without bias the
                   reverse KL, and its gradient (log p_a - log q_a) grad log p_a that one's

Chunks of tokens are computed again in the backward, so logits of one chunk exist at a time.

Shapes: N tokens, R of them in a chunk, n teachers, V vocabulary, H and Hi hidden sizes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.reverse_kl import Pair, ReverseKL, as_head, default_tile_rows, reverse_kl
from distill.reverse_kl_checks import check_shapes, compute_dtype, default_weights
from distill.reverse_kl_tile import Head

Kind = Literal["reverse_kl", "forward_kl", "jsd", "top_k", "sampled_token"]
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logp_RV, logq_RV, sampled_R1) -> [R], its gradient the divergence's."""


def divergence(
    kind: Kind,
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teachers: Sequence[Pair],
    *,
    mixture: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    top_k: int = 32,
    sampled: Tensor | None = None,
) -> ReverseKL:
    """As `reverse_kl`, its arguments and its result, with another divergence in the KL's place.

    `beta` is the teacher's weight in "jsd", strictly between 0 and 1; `top_k` the k of "top_k";
    `sampled` [N] the token ids that "sampled_token" needs.

    Raises ValueError for what does not fit.
    """
    if kind == "reverse_kl":
        weights: Any = {"mixture": mixture, "row_weight": row_weight}
        return reverse_kl(
            student_hidden, student_head, teachers, temperature=temperature, **weights
        )
    head = as_head(student_head)
    pairs = [(hidden.detach(), as_head(other).detach()) for hidden, other in teachers]
    check_shapes(student_hidden, head, pairs, mixture, row_weight)
    num_rows = len(student_hidden)
    if kind != "sampled_token":
        sampled = student_hidden.new_zeros(num_rows, dtype=torch.long)
    elif sampled is None or sampled.shape != (num_rows,):
        found = "none" if sampled is None else f"shape {tuple(sampled.shape)}"
        raise ValueError(f"sampled_token needs `sampled`, {num_rows} token ids; found {found}")
    dtype = compute_dtype(student_hidden, head, pairs)
    mixture_Nn, weight_N = default_weights(student_hidden, len(pairs), dtype, mixture, row_weight)
    chunk = partial(_chunk, _measure(kind, beta, top_k), pairs, sampled, dtype, temperature)
    value_Nn, entropy_N, logsumexp_N = _in_chunks(chunk, student_hidden, head)
    loss = (weight_N[:, None] * mixture_Nn * value_Nn).sum()
    value_Nn = value_Nn.detach()
    per_token_N = (mixture_Nn * value_Nn).sum(dim=-1)
    return ReverseKL(loss, per_token_N, entropy_N, value_Nn, logsumexp_N)


def _in_chunks(
    chunk: Callable[..., tuple[Tensor, Tensor, Tensor]], hidden_NH: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    """What `chunk` gives of all tokens, forgotten and computed again in the backward."""
    step = default_tile_rows(hidden_NH.device, len(head.weight))
    found: list[Any] = []
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for start in range(0, max(len(hidden_NH), 1), step):
            inputs = (slice(start, start + step), hidden_NH, head.weight, head.bias, head.scale)
            found.append(checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False))
    value_Nn, entropy_N, logsumexp_N = (torch.cat(x) for x in zip(*found, strict=True))
    return value_Nn, entropy_N, logsumexp_N


def _chunk(
    measure: Measure,
    teachers: Sequence[tuple[Tensor, Head]],
    sampled_N: Tensor,
    dtype: torch.dtype,
    temperature: float,
    rows: slice,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens `rows`: the divergence from each teacher [R, n], the student's entropy and the
    logsumexp of its logits [R]."""
    logits_RV = _logits(hidden_NH[rows], Head(weight_VH, bias_V, scale), dtype, temperature)
    logp_RV = logits_RV.log_softmax(dim=-1)
    value_nR: list[Tensor] = []
    for other_NH, head in teachers:
        logq_RV = _logits(other_NH[rows], head, dtype, temperature).log_softmax(dim=-1)
        value_nR.append(measure(logp_RV, logq_RV, sampled_N[rows, None]))
    entropy_R = -torch.linalg.vecdot(logp_RV.detach().exp(), logp_RV.detach())
    logsumexp_R = (logits_RV[:, 0] - logp_RV[:, 0]).detach().double()  # without another pass over V
    return torch.stack(value_nR, dim=-1), entropy_R, logsumexp_R


def _logits(hidden_RH: Tensor, head: Head, dtype: torch.dtype, temperature: float) -> Tensor:
    logits_RV = hidden_RH.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        logits_RV = logits_RV + head.bias.to(dtype)
    return logits_RV * (head.scale / temperature)


def _measure(kind: Kind, beta: float, top_k: int) -> Measure:
    if kind == "forward_kl":
        return _forward_kl
    if kind == "jsd" and 0 < beta < 1:
        return partial(_jsd, beta)
    if kind == "top_k" and top_k > 0:
        return partial(_top_k, top_k)
    if kind == "sampled_token":
        return _sampled_token
    raise ValueError(
        f"kind is {kind!r}, beta {beta}, top_k {top_k}: the kinds are {', '.join(get_args(Kind))}; "
        "beta must lie between 0 and 1 (at its ends jsd is forward_kl or reverse_kl), top_k above 0"
    )


def _forward_kl(logp_RV: Tensor, logq_RV: Tensor, sampled_R1: Tensor) -> Tensor:
    return torch.linalg.vecdot(logq_RV.exp(), logq_RV - logp_RV)


def _jsd(beta: float, logp_RV: Tensor, logq_RV: Tensor, sampled_R1: Tensor) -> Tensor:
    logm_RV = torch.logaddexp(logq_RV + math.log(beta), logp_RV + math.log1p(-beta))
    of_teacher_R = torch.linalg.vecdot(logq_RV.exp(), logq_RV - logm_RV)
    of_student_R = torch.linalg.vecdot(logp_RV.exp(), logp_RV - logm_RV)
    return beta * of_teacher_R + (1 - beta) * of_student_R


def _top_k(top_k: int, logp_RV: Tensor, logq_RV: Tensor, sampled_R1: Tensor) -> Tensor:
    logq_RK, id_RK = logq_RV.topk(min(top_k, logq_RV.shape[-1]), dim=-1)
    logp_RK = logp_RV.gather(-1, id_RK)
    return torch.linalg.vecdot(logp_RK.exp(), logp_RK - logq_RK)


def _sampled_token(logp_RV: Tensor, logq_RV: Tensor, sampled_R1: Tensor) -> Tensor:
    logp_R = logp_RV.gather(-1, sampled_R1).squeeze(-1)
    ratio_R = (logp_R - logq_RV.gather(-1, sampled_R1).squeeze(-1)).detach()
    return ratio_R + ratio_R * (logp_R - logp_R.detach())
