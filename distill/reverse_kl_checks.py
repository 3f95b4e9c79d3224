"""What the reverse KL refuses: shapes that do not fit, numbers that are not finite."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from distill.reverse_kl_tile import Head

Pairs = Sequence[tuple[Tensor, Head]]


def compute_dtype(student_hidden: Tensor, student_head: Head, teachers: Pairs) -> torch.dtype:
    """float32, or float64 where an input has it."""
    dtype = torch.float32
    pairs = ((student_hidden, student_head), *teachers)
    for tensor in chain.from_iterable((h, head.weight, head.bias) for h, head in pairs):
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def default_weights(
    student_hidden: Tensor,
    num_teachers: int,
    dtype: torch.dtype,
    mixture: Tensor | None,
    row_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of teachers [N, n] and of tokens [N], 1/n and 1/N each where none are given."""
    num_rows = len(student_hidden)
    if mixture is None:
        mixture = student_hidden.new_full((num_rows, num_teachers), 1 / num_teachers, dtype=dtype)
    if row_weight is None:
        row_weight = student_hidden.new_full((num_rows,), 1 / max(num_rows, 1), dtype=dtype)
    return mixture.detach().to(dtype), row_weight.detach().to(dtype)


def check_shapes(
    student_hidden: Tensor,
    student_head: Head,
    teachers: Pairs,
    mixture: Tensor | None,
    row_weight: Tensor | None,
) -> None:
    """Raises ValueError."""
    num_rows, num_tokens = student_hidden.shape[0], student_head.weight.shape[0]
    if not teachers:
        raise ValueError("reverse_kl needs at least one teacher, found none")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "student_head": (student_head.weight, (num_tokens, student_hidden.shape[1])),
        "the student's bias": (student_head.bias, (num_tokens,)),
        "mixture": (mixture, (num_rows, len(teachers))),
        "row_weight": (row_weight, (num_rows,)),
    }
    for i, (hidden, head) in enumerate(teachers):
        size = head.weight.shape[1]
        wanted[f"teacher {i}'s hidden states"] = (hidden, (num_rows, size))
        wanted[f"teacher {i}'s head"] = (head.weight, (num_tokens, size))
        wanted[f"teacher {i}'s bias"] = (head.bias, (num_tokens,))
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, needed is {shape}: there are "
                f"{num_rows} tokens and {num_tokens} entries in the student's vocabulary"
            )


def check_finite(
    per_teacher_Nn: Tensor,
    weighted_N: Tensor,
    student: tuple[Tensor, Head],
    teachers: Pairs,
) -> None:
    """Raises FloatingPointError; everything else is looked at only once something is wrong."""
    if weighted_N.isfinite().all():  # a KL that is not finite makes its weighted one so, 0 included
        return
    row = int((~weighted_N.isfinite()).nonzero()[0])
    wrong_n = ~per_teacher_Nn[row].isfinite()
    if not wrong_n.any():
        raise FloatingPointError(f"the mixture or the row weight of row {row} is not finite")
    i = int(wrong_n.nonzero()[0])
    suspects = [
        (f"row {row} of the student's hidden states", student[0][row]),
        ("the student's head", student[1].weight),
        ("the student's bias", student[1].bias),
        (f"row {row} of teacher {i}'s hidden states", teachers[i][0][row]),
        (f"teacher {i}'s head", teachers[i][1].weight),
        (f"teacher {i}'s bias", teachers[i][1].bias),
    ]
    found = [name for name, x in suspects if x is not None and not x.isfinite().all()]
    raise FloatingPointError(
        f"the reverse KL of row {row} to teacher {i} is {per_teacher_Nn[row, i].item()}: "
        + (
            f"not finite: {' and '.join(found)}"
            if found
            else "its logits overflow, or are not finite on another rank"
        )
    )
