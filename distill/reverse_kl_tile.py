"""One tile of the reverse KL: logits, what is summed over them, and the loss's gradient there.

Logits are in bits, z = z_nats log2(e): base-2 exponentials are the faster ones in torch on a CPU,
and what a GPU has. With u = z - max z and E = 2^u a row needs, in one sweep,

    s = sum E,  b = sum E u,  s' and max y of the teacher's logits y,  D = z - y,  g = sum E D

so log p - log q = D - (log2 s + max z) + (log2 s' + max y), and p D's mean is g / s; then in a
second sweep slope = factor E (D - mean). Only D - mean enters, so no logit is ever normalised. A
CPU goes through a tile in blocks of rows that stay in its cache, so memory sees the logits thrice.

Shapes: R tokens of a tile, V vocabulary (this rank's part), n teachers, H hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distill.kernels import use_kernels
from distill.reverse_kl_group import all_gather

BLOCK_ELEMENTS = 2**18
"""Logits of the rows that a CPU sweeps at once: three such blocks, 3 MiB in all."""
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """A model's last layer: logits = scale * (hidden @ weight.T + bias)."""

    weight: Tensor
    """[V, H]; with a process group this rank's rows."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """Weight, and bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Head":
        """With change(x) in the place of each tensor."""
        bias = None if self.bias is None else change(self.bias)
        return Head(change(self.weight), bias, self.scale)

    def detach(self) -> "Head":
        """Without a gradient."""
        return self.map(Tensor.detach)

    def rows(self, rows: slice) -> "Head":
        """Some rows of the vocabulary, in memory of their own."""
        return self.map(lambda x: x[rows].clone())

    def to(self, device: torch.device) -> "Head":
        """The same numbers on the device."""
        return self.map(lambda x: x.to(device))


@dataclass(frozen=True, slots=True)
class Found:
    """What a tile gives, in nats."""

    per_teacher_Rn: Tensor
    entropy_R: Tensor
    logsumexp_R: Tensor
    slope_RV: Tensor | None
    """The loss's gradient at the student's h W^T + b; valid until the next tile."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What the sweeps' sums of all ranks come to."""

    per_teacher_Rn: Tensor
    entropy_R: Tensor
    logsumexp_R: Tensor
    mean_R: Tensor
    """p D's mean, less what this rank's D is short of the true one."""
    share_R: Tensor
    """p = share E."""


class Tile:
    """The working memory of a student and its teachers, used for tile after tile."""

    def __init__(
        self,
        models: Sequence[tuple[Tensor, Head]],
        dtype: torch.dtype,
        num_rows: int,
        temperature: float,
        group: ProcessGroup | None,
    ) -> None:
        self.models, self.group = models, group
        self.factors = [math.log2(math.e) * head.scale / temperature for _, head in models]
        # bits in which the factor and D are, back to nats
        self.slope_factor = self.factors[0] * math.log(2) ** 2
        like, num_tokens = models[0][0], len(models[0][1].weight)
        self.num_teachers = len(models) - 1
        num_strips = min(len(models), 3)  # of student, gap, and the teachers but the first
        self.strips = [strip(like, dtype, num_rows, num_tokens) for _ in range(num_strips)]
        self.uses_kernels = use_kernels(self.strips[0])
        self.slope_dtype = like.dtype if is_narrow(like, models[0][1].weight) else dtype
        self.block = num_rows
        if like.device.type == "cpu":
            self.block = min(num_rows, max(1, BLOCK_ELEMENTS // max(num_tokens, 1)))
        size = (0 if self.uses_kernels else self.block, num_tokens)
        self.scratch = torch.empty(size, dtype=dtype, device=like.device)

    def __call__(
        self, rows: slice, mixture_Rn: Tensor, weight_R: Tensor, wants_slope: bool
    ) -> Found:
        """The tokens `rows`; `wants_slope` or their values only."""
        mixes = self.num_teachers > 1
        share_Rn = mixture_Rn if mixes else torch.ones_like(mixture_Rn)
        factor_R = weight_R if mixes else weight_R * mixture_Rn[:, 0]
        factor_R = factor_R * self.slope_factor
        student_RV, gap_RV, *_ = (x[: len(weight_R)] for x in self.strips)
        units = self._logits(0, rows, student_RV)
        at_once = wants_slope and not mixes and self.group is None and not self.uses_kernels
        sums: list[Tensor] = []
        for i in range(self.num_teachers):
            teacher_RV = self.strips[1 if i == 0 else 2][: len(weight_R)]
            pair = (units, self._logits(i + 1, rows, teacher_RV))
            sums.append(self._compare(student_RV, teacher_RV, pair, factor_R if at_once else None))
            if mixes and i == 0:
                gap_RV.mul_(share_Rn[:, :1])
            elif mixes:
                gap_RV.addcmul_(teacher_RV, share_Rn[:, i, None])
        total = combine(sums, share_Rn, shifted=not self.uses_kernels, group=self.group)
        slope_RV = gap_RV if wants_slope else None
        if wants_slope and not at_once:
            factor_R = factor_R * total.share_R.to(factor_R.dtype)
            maximum_R, mean_R = sums[0][0], total.mean_R.to(factor_R.dtype)
            slope_RV = self._slope(student_RV, gap_RV, units, maximum_R, mean_R, factor_R)
        if slope_RV is not None:
            slope_RV = slope_RV.to(self.slope_dtype)
        return Found(total.per_teacher_Rn, total.entropy_R, total.logsumexp_R, slope_RV)

    def _logits(self, i: int, rows: slice, out_RV: Tensor) -> float:
        """Model i's, into `out_RV`; what they are still to be multiplied by to be in bits."""
        (hidden_NH, head), factor = self.models[i], self.factors[i]
        hidden_RH = hidden_NH[rows]
        if is_narrow(hidden_RH, head.weight):
            product(hidden_RH, head.weight.T, out_RV)
            if head.bias is not None:
                out_RV.add_(head.bias)
            if self.uses_kernels:
                return factor
            out_RV.mul_(factor)
            return 1.0
        hidden_RH = hidden_RH.to(out_RV.dtype) * factor  # H numbers a token, not V
        if head.bias is None:
            product(hidden_RH, head.weight.T, out_RV)
        else:
            torch.addmm(head.bias * factor, hidden_RH, head.weight.T, out=out_RV)
        return 1.0

    def _blocks(self, *strips: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        for start in range(0, len(strips[0]), max(self.block, 1)):
            rows = slice(start, start + self.block)
            yield rows, [x[rows] for x in strips]

    def _compare(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor,
        units: tuple[float, float],
        factor_R: Tensor | None,
    ) -> Tensor:
        """The first sweep, (6, R), see `compare`; with `factor_R` also the second. A rank without
        rows of the vocabulary has next to nothing."""
        if not student_RV.shape[1]:
            least = torch.finfo(student_RV.dtype).min  # finite: it is multiplied by 0
            nothing_6 = student_RV.new_tensor([least, 1.0, 0.0, least, 1.0, 0.0])
            return nothing_6[:, None].repeat(1, len(student_RV))
        if self.uses_kernels:
            from distill.kernels import tile

            return tile.compare(student_RV, teacher_RV, *units)
        found_6R = student_RV.new_empty(6, len(student_RV))
        for rows, (student_rV, teacher_rV) in self._blocks(student_RV, teacher_RV):
            scratch_rV = self.scratch[: len(student_rV)]
            found_6r = found_6R[:, rows]
            found_6r.copy_(compare(student_rV, teacher_rV, scratch_rV))
            if factor_R is not None:
                _, sum_r, *_, gap_r = found_6r
                slope(teacher_rV, scratch_rV, gap_r / sum_r, factor_R[rows] / sum_r)
        return found_6R

    def _slope(
        self,
        student_RV: Tensor,
        gap_RV: Tensor,
        unit: float,
        maximum_R: Tensor,
        mean_R: Tensor,
        factor_R: Tensor,
    ) -> Tensor:
        """The second sweep, in the place of `gap_RV`, or by a kernel in `slope_dtype`."""
        if self.uses_kernels and gap_RV.shape[1]:
            from distill.kernels import tile

            dtype = self.slope_dtype
            return tile.slope(student_RV, gap_RV, unit, maximum_R, mean_R, factor_R, dtype)
        for rows, (student_rV, gap_rV) in self._blocks(student_RV, gap_RV):
            exp_rV = torch.exp2(student_rV, out=self.scratch[: len(student_rV)])
            slope(gap_rV, exp_rV, mean_R[rows], factor_R[rows])
        return gap_RV


def is_narrow(hidden: Tensor, weight: Tensor) -> bool:
    """A product that a GPU makes of 16-bit numbers and sums in float32."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return hidden.is_cuda and is_half and hidden.dtype == weight.dtype


def widen(model: tuple[Tensor, Head], dtype: torch.dtype) -> tuple[Tensor, Head]:
    """The head in the dtype of the computation, unless a GPU multiplies it as it is."""
    hidden_NH, head = model
    bias = None if head.bias is None else head.bias.to(dtype)
    if dtype == torch.float32 and is_narrow(hidden_NH, head.weight):
        return hidden_NH, Head(head.weight, bias, head.scale)
    return hidden_NH, Head(head.weight.to(dtype), bias, head.scale)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; of 16-bit numbers summed in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, likewise."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def strip(like: Tensor, dtype: torch.dtype, num_rows: int, num_tokens: int) -> Tensor:
    """(num_rows, num_tokens), rows so far apart that matrix products are fast: a multiple of 64
    bytes, not of a page (whose rows would compete for the same lines of the cache)."""
    row = -(-num_tokens // 16) * 16
    if row * dtype.itemsize % PAGE_BYTES == 0:
        row += 80
    return torch.empty(num_rows, row, dtype=dtype, device=like.device)[:, :num_tokens]


def compare(student_rV: Tensor, teacher_rV: Tensor, scratch_rV: Tensor) -> Tensor:
    """(6, r): max z, s, b, max y, s', g. Leaves u for the student's logits, D for the teacher's,
    short of the true one by max z - max y, and E in the scratch."""
    top_r1 = teacher_rV.amax(dim=-1, keepdim=True)
    other_r = torch.exp2(teacher_rV.sub_(top_r1), out=scratch_rV).sum(dim=-1)
    maximum_r1 = student_rV.amax(dim=-1, keepdim=True)
    exp_rV = torch.exp2(student_rV.sub_(maximum_r1), out=scratch_rV)
    torch.sub(student_rV, teacher_rV, out=teacher_rV)
    sums = (exp_rV.sum(dim=-1), torch.linalg.vecdot(exp_rV, student_rV))
    gap_r = torch.linalg.vecdot(exp_rV, teacher_rV)
    return torch.stack([maximum_r1.squeeze(1), *sums, top_r1.squeeze(1), other_r, gap_r])


def slope(gap_rV: Tensor, exp_rV: Tensor, mean_r: Tensor, factor_r: Tensor) -> None:
    """factor E (D - mean) in the place of D."""
    gap_rV.sub_(mean_r[:, None]).mul_(exp_rV).mul_(factor_r[:, None])


def combine(
    sums: Sequence[Tensor], share_Rn: Tensor, *, shifted: bool, group: ProcessGroup | None
) -> Sums:
    """Of one (6, R) a teacher, `shifted` where D is short of z - y by max z - max y. In float64,
    since what large logits have in common cancels here; a rank's logsumexps and means tell all."""
    maximum_R, sum_R, weighted_R = sums[0][:3].double()
    top_nR, other_nR, gap_nR = torch.stack([x[3:] for x in sums], dim=1).double()
    short_nR = maximum_R - top_nR if shifted else torch.zeros_like(top_nR)
    own_R = maximum_R + sum_R.log2()
    parts = (own_R, weighted_R / sum_R + maximum_R), (top_nR + other_nR.log2(), gap_nR / sum_R)
    (_, level_R), (other_nR, gap_nR) = parts
    gap_nR = gap_nR + short_nR
    mine = torch.cat([torch.stack([own_R, level_R]), other_nR, gap_nR])
    every_gKR = all_gather(mine, group)
    n = len(top_nR)
    lse_R = logsumexp2(every_gKR[:, 0])
    part_gR = (every_gKR[:, 0] - lse_R).exp2()
    level_R = (part_gR * every_gKR[:, 1]).sum(dim=0)
    other_nR = logsumexp2(every_gKR[:, 2 : 2 + n])
    mean_nR = (part_gR[:, None] * every_gKR[:, 2 + n :]).sum(dim=0)
    ln2 = math.log(2)
    return Sums(
        per_teacher_Rn=(ln2 * (mean_nR - (lse_R - other_nR))).T,
        entropy_R=ln2 * (lse_R - level_R),
        logsumexp_R=ln2 * lse_R,
        mean_R=(share_Rn.T * (mean_nR - short_nR)).sum(dim=0),
        share_R=(maximum_R - lse_R).exp2(),
    )


def logsumexp2(x: Tensor) -> Tensor:
    """log2 of the sum of 2^x over the first dimension; a single one's is itself."""
    top = x.amax(dim=0)
    return top + (x - top).exp2().sum(dim=0).log2()
