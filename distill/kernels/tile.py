"""The two sweeps of reverse_kl_tile.py over a tile of logits on a GPU: `compare` and `slope`.

A program has one row and goes through it block by block; the maxima, and the sums scaled to them,
move on together, so that the logits are read once by each sweep. Logits may be in other units:
`unit` turns them into bits. D is left as z - y, short of nothing.

The torch reference is reverse_kl_tile's functions of the same names.

Shapes: R tokens, V vocabulary.
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
import triton.language as tl  # pyright: ignore[reportMissingImports]  # the same
from torch import Tensor

BLOCK = 4096


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, whose own type is unknown where triton is not installed."""
    return triton.jit(function)


def compare(
    student_RV: Tensor, teacher_RV: Tensor, student_unit: float, teacher_unit: float
) -> Tensor:
    """(6, R): max z, s, b, max y, s', g, all of logits in bits. Leaves D for the teacher's."""
    num_rows, num_tokens = student_RV.shape
    found_6R = student_RV.new_empty(6, num_rows)
    if num_rows:
        with torch.cuda.device_of(student_RV):
            _compare[(num_rows,)](
                student_RV,
                teacher_RV,
                found_6R,
                student_unit,
                teacher_unit,
                num_rows,
                num_tokens,
                student_RV.stride(0),
                teacher_RV.stride(0),
                BLOCK=BLOCK,
            )
    return found_6R


def slope(
    student_RV: Tensor,
    gap_RV: Tensor,
    unit: float,
    maximum_R: Tensor,
    mean_R: Tensor,
    factor_R: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """factor E (D - mean): in the place of `gap_RV`, or a new tensor where `dtype` is another."""
    num_rows, num_tokens = student_RV.shape
    out_RV = gap_RV if dtype == gap_RV.dtype else torch.empty_like(gap_RV, dtype=dtype)
    if num_rows:
        with torch.cuda.device_of(student_RV):
            _slope[(num_rows, triton.cdiv(num_tokens, BLOCK))](
                student_RV,
                gap_RV,
                out_RV,
                unit,
                maximum_R.contiguous(),
                mean_R.contiguous(),
                factor_R.contiguous(),
                num_tokens,
                student_RV.stride(0),
                gap_RV.stride(0),
                out_RV.stride(0),
                BLOCK=BLOCK,
            )
    return out_RV


@jit
def _compare(
    student,
    teacher,
    found,
    student_unit,
    teacher_unit,
    R,
    V,
    student_stride,
    teacher_stride,
    BLOCK: tl.constexpr,
):
    """One row a program. A sum about a maximum m is turned into one about m' > m by 2^(m - m'),
    and b, whose summands hold z - m as well, by (b + s (m - m')) 2^(m - m')."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    top = tl.full((), -float("inf"), tl.float32)
    other_top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    other_total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    gap = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < V
        z = tl.load(student + v, mask=inside, other=-float("inf")) * student_unit
        y = tl.load(teacher + v, mask=inside, other=-float("inf")) * teacher_unit
        new_top = tl.maximum(top, tl.max(z, 0))
        new_other = tl.maximum(other_top, tl.max(y, 0))
        shrink = tl.exp2(top - new_top)
        moved = tl.where(total > 0, total * (top - new_top), 0.0)
        u = z - new_top
        e = tl.exp2(u)
        d = tl.where(inside, z - y, 0.0)
        weighted = (weighted + moved) * shrink + tl.sum(tl.where(inside, e * u, 0.0), 0)
        total = total * shrink + tl.sum(e, 0)
        gap = gap * shrink + tl.sum(e * d, 0)
        other_total = other_total * tl.exp2(other_top - new_other) + tl.sum(
            tl.exp2(y - new_other), 0
        )
        top = new_top
        other_top = new_other
        tl.store(teacher + v, d, mask=inside)
    tl.store(found + row, top)
    tl.store(found + R + row, total)
    tl.store(found + 2 * R + row, weighted)
    tl.store(found + 3 * R + row, other_top)
    tl.store(found + 4 * R + row, other_total)
    tl.store(found + 5 * R + row, gap)


@jit
def _slope(
    student,
    gap,
    out,
    unit,
    maximum,
    mean,
    factor,
    V,
    student_stride,
    gap_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    """BLOCK logits of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    z = tl.load(student + row * student_stride + v, mask=inside, other=0.0) * unit
    d = tl.load(gap + row * gap_stride + v, mask=inside, other=0.0)
    e = tl.exp2(z - tl.load(maximum + row))
    found = tl.load(factor + row) * e * (d - tl.load(mean + row))
    tl.store(out + row * out_stride + v, found.to(out.dtype.element_ty), mask=inside)
