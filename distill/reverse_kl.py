"""Reverse KL of a student to its teachers over the whole vocabulary, straight from hidden states.

    l_n = sum_i w_ni sum_v p_nv (log p_nv - log q_inv),   p = softmax(z / T),  z = scale (h W^T + b)
    dl_n / dz_nv = (1/T) p_nv (sum_i w_ni (log p_nv - log q_inv) - l_n)

The second line needs nothing that the first has not just made, so both gradients are formed in
the forward pass, tile by tile of tokens (as in fused linear cross-entropy): four matrix products
a tile with one teacher, three where the head is frozen, two where nothing wants a gradient; nothing
computed twice, no tensor of [N, V]. There is no mode that computes logits again in the backward:
what is kept for a frozen head is [N, H], which the backward gives out as it is, so such a mode
would take two products more and save nothing but that (torch's reentrant checkpoint does so).

Over a process group each rank holds some rows of every head (reverse_kl_group.py): a tile's
numbers a token travel in one collective, the hidden states' gradient in one at the end.

Shapes: N tokens, R of them in a tile, n teachers, V vocabulary (this rank's part of it over a
group), H and Hi hidden sizes of the student and of teacher i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distill.reverse_kl_checks import check_finite, check_shapes, compute_dtype, default_weights
from distill.reverse_kl_group import agree, all_reduce
from distill.reverse_kl_tile import Head, Tile, add_product, product, widen

__all__ = ["Head", "Pair", "ReverseKL", "reverse_kl"]

TILE_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}
"""Logits of a tile by kind of device; the tile has MIN_TILE to MAX_TILE tokens whatever follows.
With few tokens a tile the heads' matrix products wait for memory."""
MIN_TILE, MAX_TILE = 128, 4096

Pair = tuple[Tensor, Tensor | Head]
"""A model's hidden states [N, Hi] and head, [V, Hi] or a Head."""


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """What `reverse_kl` gives, in nats; only `loss` carries a gradient."""

    loss: Tensor
    """sum_n row_weight_n per_token_n, a scalar."""

    per_token: Tensor
    """l_n, [N]."""

    entropy: Tensor
    """The student's entropy, [N]."""

    per_teacher: Tensor
    """KL(student || teacher i), [N, n]."""

    logsumexp: Tensor
    """log sum_v exp(z_nv / T) of the student's logits, [N] in float64."""


@dataclass(frozen=True, slots=True)
class _Rest:
    """What the function takes that gets no gradient."""

    scale: float
    teachers: list[tuple[Tensor, Head]]
    mixture_Nn: Tensor
    weight_N: Tensor
    temperature: float
    tile_rows: int
    group: ProcessGroup | None


def reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teachers: Sequence[Pair],
    *,
    mixture: Tensor | None = None,
    row_weight: Tensor | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    tile_rows: int | None = None,
) -> ReverseKL:
    """KL(student || teachers) of N tokens, weighted and summed, for student_hidden [N, H],
    student_head [V, H] (or a Head) and for each teacher its hidden states [N, Hi] and head [V, Hi].

    `mixture` [N, n] weighs the teachers of a token (1/n each by default), `row_weight` [N] the
    tokens (1/N each by default). Gradients go to the student's tensors alone. Computed and
    accumulated in float32, or in float64 where an input has it; on a GPU heads and hidden states of
    bfloat16 or float16 are multiplied as they are, and the logits' gradient is rounded to them.
    `tile_rows`, the tokens whose logits exist at once, changes speed and memory only.

    With `group` all its ranks give the same tokens, and as heads their rows of the vocabulary, any
    number each. All get the same results, the whole gradient of the hidden states, and that of
    their own rows of the head.

    Raises ValueError where shapes do not fit, FloatingPointError where a KL is not finite (over a
    group on all its ranks).
    """
    head = as_head(student_head)
    pairs = [(hidden.detach(), as_head(other).detach()) for hidden, other in teachers]
    check_shapes(student_hidden, head, pairs, mixture, row_weight)
    num_teachers = len(pairs)
    num_tokens = agree(student_hidden, head.weight, num_teachers, group)
    dtype = compute_dtype(student_hidden, head, pairs)
    mixture, row_weight = default_weights(student_hidden, num_teachers, dtype, mixture, row_weight)
    rest = _Rest(
        scale=head.scale,
        teachers=pairs,
        mixture_Nn=mixture,
        weight_N=row_weight,
        temperature=temperature,
        tile_rows=tile_rows or default_tile_rows(student_hidden.device, num_tokens),
        group=group,
    )
    if not torch.is_grad_enabled():  # the function sees requires_grad alone: gradients for nobody
        student_hidden, head = student_hidden.detach(), head.detach()
    with torch.autocast(student_hidden.device.type, enabled=False):
        outputs = _ReverseKL.apply(student_hidden, head.weight, head.bias, rest)
    return ReverseKL(*outputs)


def as_head(head: Tensor | Head) -> Head:
    return Head(head) if isinstance(head, Tensor) else head


def default_tile_rows(device: torch.device, num_tokens: int) -> int:
    """For a vocabulary (or the longest part of one) of so many tokens; a multiple of 64."""
    elements = TILE_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    return min(max(MIN_TILE, elements // max(num_tokens, 1) // 64 * 64), MAX_TILE)


class _ReverseKL(torch.autograd.Function):
    """The loss, and the student's gradients of it, kept until backward asks for them."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: _Rest
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors of ReverseKL, in its order."""
        wants = ctx.needs_input_grad[:3]
        student = (student_hidden, Head(weight, bias, rest.scale))
        dtype, num_rows = rest.weight_N.dtype, student_hidden.shape[0]
        models = [widen(pair, dtype) for pair in (student, *rest.teachers)]
        tile = Tile(models, dtype, min(rest.tile_rows, num_rows), rest.temperature, rest.group)
        per_teacher_Nn, entropy_N = (torch.empty_like(x) for x in (rest.mixture_Nn, rest.weight_N))
        logsumexp_N = torch.empty_like(entropy_N, dtype=torch.float64)
        gradients = _Gradients(models[0], dtype, wants)
        for start in range(0, num_rows, rest.tile_rows):
            rows = slice(start, start + rest.tile_rows)
            found = tile(rows, rest.mixture_Nn[rows], rest.weight_N[rows], any(wants))
            per_teacher_Nn[rows], entropy_N[rows] = found.per_teacher_Rn, found.entropy_R
            logsumexp_N[rows] = found.logsumexp_R
            if found.slope_RV is not None:
                gradients.add(rows, found.slope_RV)
        per_token_N = (rest.mixture_Nn * per_teacher_Nn).sum(dim=-1)
        check_finite(per_teacher_Nn, rest.weight_N * per_token_N, student, rest.teachers)
        if gradients.hidden_NH is not None:
            all_reduce(gradients.hidden_NH, rest.group)
        inputs = (student_hidden, weight, bias)
        kept = (gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        ctx.save_for_backward(
            *(
                None if grad is None or x is None else grad.to(x.dtype)
                for grad, x in zip(kept, inputs, strict=True)
            )
        )
        values = (per_token_N, entropy_N, per_teacher_Nn, logsumexp_N)
        ctx.mark_non_differentiable(*values)
        return (rest.weight_N * per_token_N).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the loss's own: in place where nobody may ask again, since the
        head's may be gigabytes."""
        if torch.is_grad_enabled():  # create_graph: it would be missing in silence
            raise RuntimeError("reverse_kl has no second derivative: its gradients are constants")
        keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore  # autograd's own has no public name
        factor = grad_outputs[0]
        grads = [
            None if grad is None else grad * factor if keeps else grad.mul_(factor)
            for grad in ctx.saved_tensors
        ]
        return (*grads, None)


class _Gradients:
    """Of the student's hidden states [N, H], of its head's weight [V, H] and bias [V], each where
    it is wanted; summed over tiles in the dtype of the computation."""

    def __init__(
        self, student: tuple[Tensor, Head], dtype: torch.dtype, wants: Sequence[bool]
    ) -> None:
        self.hidden, self.head = student
        self.hidden_NH = torch.zeros_like(self.hidden, dtype=dtype) if wants[0] else None
        self.weight_VH = torch.zeros_like(self.head.weight, dtype=dtype) if wants[1] else None
        is_biased = wants[2] and self.head.bias is not None
        self.bias_V = (
            self.hidden.new_zeros(len(self.head.weight), dtype=dtype) if is_biased else None
        )

    def add(self, rows: slice, slope_RV: Tensor) -> None:
        """Of a tile: `slope_RV` is the loss's gradient at h W^T + b, narrow where they are."""
        hidden_RH = self.hidden[rows].to(slope_RV.dtype)
        if self.hidden_NH is not None:
            product(slope_RV, self.head.weight, self.hidden_NH[rows])
        if self.weight_VH is not None:
            add_product(self.weight_VH, slope_RV.T, hidden_RH)
        if self.bias_V is not None:
            self.bias_V += slope_RV.sum(dim=0, dtype=self.bias_V.dtype)
