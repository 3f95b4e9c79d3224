"""The mixture of experts: tokens sorted by expert, one GEMM pair for each.

Legend: T tokens, H hidden size, k experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import maybe_autocast

from posttrain.backbone import again
from posttrain.backbone.balance import attach_balance
from posttrain.backbone.decode_norm import projected
from posttrain.backbone.fake_quant import rounds
from posttrain.backbone.fp4 import fake_fp8_activation, fake_mxfp4
from posttrain.backbone.function import plain_backward
from posttrain.backbone.routing import Routes, RouteTape, route
from posttrain.backbone.swiglu import shared, swiglu, weighted, weighted_backward

ROWS = 16
"""From so many rows on, torch's CPU products round each row alike, however many there are."""

grouped_mm: Any = getattr(F, "grouped_mm", None) or vars(torch)["_grouped_mm"]  # before 2.10


class Weights(NamedTuple):
    """All experts' weights of one layer."""

    gate_up_proj: Tensor
    down_proj: Tensor
    limit: float


class Serving(NamedTuple):
    """What of the experts is rounded as serving rounds it (fake_quant.py)."""

    limit: float
    """Of SwiGLU."""
    rounds_inputs: bool = False
    """Of both matrices, to FP8 and back."""
    rounds_weights: bool = False
    """To MXFP4 and back."""


class V4Experts(stock.DeepseekV4Experts):
    """Stock's parameters. A module that is called: PEFT's `target_parameters` put their weights in
    place for the time of the call."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, x_TH: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, H), chosen experts and their weights (T, k) -> (T, H)."""
        return run_experts(
            self,
            x_TH,
            expert_Tk,
            weight_Tk,
            rounds_inputs=rounds(self.config, "activations"),
            rounds_weights=rounds(self.config, "experts"),
        )

    def served(self) -> Any:
        """The weights as serving has them: these, or rounded where that is trained for."""
        if not rounds(self.config, "experts"):
            return self
        own: Any = self
        return Weights(fake_mxfp4(own.gate_up_proj), fake_mxfp4(own.down_proj), own.limit)


class V4SharedExpert(stock.DeepseekV4MLP):
    """Stock's, whose matrices it takes; the expert that every token goes to."""

    def __init__(self, mlp: Any) -> None:
        super(stock.DeepseekV4MLP, self).__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.limit = mlp.limit

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        if not torch.is_grad_enabled():
            gate, up = projected(self.gate_proj, x), projected(self.up_proj, x)
            return projected(self.down_proj, shared(gate, up, self.limit))
        return self.down_proj(shared(self.gate_proj(x), self.up_proj(x), self.limit))


class V4SparseMoeBlock(stock.DeepseekV4SparseMoeBlock):
    """Stock's router, experts and shared expert over flat tokens."""

    def __init__(self, config: DeepseekV4Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.experts = V4Experts(config)
        self.shared_experts = V4SharedExpert(self.shared_experts)

    def forward(self, x_TH: Tensor, token_id_T: Tensor, context: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, H), token ids (T,) for hash layers -> (T, H), the balance loss attached where it
        is wanted. `context` is the forward's; one decode step's has no losses."""
        tape: RouteTape | None = getattr(context, "tape", None)
        replay_Tk = tape.replay(self.layer_idx) if tape else None
        routes = route(self.gate, x_TH, token_id_T, is_hash=self.is_hash, replay_Tk=replay_Tk)
        if tape:
            tape.record(self.layer_idx, self.gate, routes, is_hash=self.is_hash)
        out_TH = self._routed(x_TH, routes, getattr(context, "real_X", None))
        out_TH = out_TH + self.shared_experts(x_TH)
        scale = getattr(context, "balance_loss_scale", None)
        if scale is None or self.is_hash:
            return out_TH
        top_k = routes.expert_Tk.shape[1]
        return attach_balance(out_TH, routes.score_TE, context.documents, k=top_k, scale=scale)

    def _routed(self, x_TH: Tensor, routes: Routes, real_X: Tensor | None) -> Tensor:
        """What the routed experts give of `real_X`, the tokens that are not filling; None: all."""
        args: tuple[Any, ...] = x_TH, routes.expert_Tk, routes.weight_Tk
        if real_X is None or len(real_X) == len(x_TH):
            return self.experts(*args)
        out_XH = self.experts(*(x.index_select(0, real_X) for x in args))
        return torch.zeros_like(x_TH).index_copy_(0, real_X, out_XH)


def run_experts(
    experts: Any,
    x_TH: Tensor,
    expert_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    rounds_inputs: bool = False,
    rounds_weights: bool = False,
) -> Tensor:
    """sum_j weight[t, j] * expert[t, j](x[t]), (T, H). Every expert takes part, with no rows if
    need be, so that every expert has a gradient on every rank; rounded as `Serving` says."""
    device = x_TH.device.type
    is_cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else x_TH.dtype
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not rounds_weights:  # else they round from their own precision
        gate_up, down = gate_up.to(dtype), down.to(dtype)
    x_TH = fake_fp8_activation(x_TH) if rounds_inputs else x_TH
    with maybe_autocast(device_type=device, enabled=False):
        serving = Serving(experts.limit, rounds_inputs, rounds_weights)
        args = x_TH.to(dtype), weight_Tk, gate_up, down, expert_Tk, serving
        if not torch.is_grad_enabled():
            # at a token a row the graph's bookkeeping would be felt; in training this is the first
            # pass of a reentrant checkpoint, whose second has a gradient and the same bits
            is_served = device == "cpu" and not getattr(experts, "training", False)
            return served(*args) if is_served else routed(*args)[0]
        out_TH: Any = RoutedExperts.apply(*args)
    return out_TH


def routed(
    x_TH: Tensor,
    weight_Tk: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    expert_Tk: Tensor,
    serving: Serving,
) -> tuple[Tensor, Groups, Tensor, Tensor]:
    """The output (T, H), and what the backward needs: groups, order (R,), gate and up (R, J), none
    of a long batch."""
    expert_R, order_R = expert_Tk.flatten().sort(stable=True)
    groups = Groups(expert_R, len(gate_up_EJH))
    token_R, weight_R = order_R // expert_Tk.shape[1], _by_row(weight_Tk, order_R)

    def run(rows: slice, experts: slice, group: Groups) -> tuple[Tensor, Tensor]:
        gate_up = rounded(gate_up_EJH[experts], x_TH, serving)
        gate_up_RJ = group.times(x_TH.index_select(0, token_R[rows]), gate_up.mT)
        hidden_RI = weighted(gate_up_RJ, weight_R[rows], serving.limit)
        hidden_RI = fake_fp8_activation(hidden_RI) if serving.rounds_inputs else hidden_RI
        return group.times(hidden_RI, rounded(down_EHI[experts], x_TH, serving).mT), gate_up_RJ

    parts = groups.parts(len(x_TH))
    if len(parts) == 1:
        out_RH, gate_up_RJ = run(*parts[0])
        return _sum_by_token(out_RH, order_R, expert_Tk.shape), groups, order_R, gate_up_RJ
    out_TH = torch.zeros_like(x_TH)
    for part in parts:
        out_TH.index_add_(0, token_R[part[0]], run(*part)[0])
    return out_TH, groups, order_R, x_TH.new_empty(0)


def served(
    x_TH: Tensor,
    weight_Tk: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    expert_Tk: Tensor,
    serving: Serving,
) -> Tensor:
    """The output of `routed` on CPU, with nothing kept and in fewer calls. What a token gets does
    not depend on how many others go to its experts: each product has at least `ROWS` rows, the
    last of them those of the experts after it, whose own products then write over theirs."""
    expert_R, top_k = expert_Tk.flatten(), expert_Tk.shape[1]
    if not len(expert_R):
        return torch.zeros_like(x_TH)
    order_R = expert_R.argsort(stable=True)
    spans, first = list[slice](), 0
    for count in torch.bincount(expert_R, minlength=len(gate_up_EJH)).tolist():
        spans.append(slice(first, first + max(count, ROWS) if count else first))
        first += count
    x_PH = x_TH.index_select(0, F.pad(order_R // top_k, (0, ROWS)))
    gate_PI, up_PI = _products(x_PH, rounded(gate_up_EJH, x_TH, serving), spans).chunk(2, dim=1)
    hidden_PI = swiglu(gate_PI, up_PI, serving.limit)
    hidden_PI[:first].mul_(_by_row(weight_Tk, order_R).unsqueeze(1))
    hidden_PI = fake_fp8_activation(hidden_PI) if serving.rounds_inputs else hidden_PI
    out_PH = _products(hidden_PI, rounded(down_EHI, x_TH, serving), spans)
    out_RH = torch.empty_like(out_PH[:first]).index_copy_(0, order_R, out_PH[:first])
    return out_RH.view(len(x_TH), top_k, -1).sum(1)


def _products(rows_PA: Tensor, weight_EBA: Tensor, spans: Sequence[slice]) -> Tensor:
    """Each expert's weight times the rows in its span, (P, B), expert after expert."""
    out_PB = rows_PA.new_empty(len(rows_PA), weight_EBA.shape[1])
    for span, weight_AB in zip(spans, weight_EBA.mT.unbind(0), strict=True):
        if span.stop > span.start:
            torch.mm(rows_PA[span], weight_AB, out=out_PB[span])
    return out_PB


class RoutedExperts(torch.autograd.Function):
    """`run_experts` over rows sorted by expert: R = T k rows, gathered again in the backward
    rather than kept.

    The weight multiplies the I hidden channels, not the H outputs: fewer, and its gradient then
    needs no output kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_Tk: Tensor,
        gate_up_EJH: Tensor,
        down_EHI: Tensor,
        expert_Tk: Tensor,
        serving: Serving,
    ) -> Tensor:
        args = x_TH, weight_Tk, gate_up_EJH, down_EHI, expert_Tk, serving
        out_TH, groups, order_R, gate_up_RJ = routed(*args)
        ctx.save_for_backward(x_TH, weight_Tk, gate_up_EJH, down_EHI, order_R, gate_up_RJ)
        ctx.groups, ctx.serving = groups, serving
        return out_TH

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TH, weight_Tk, gate_up_EJH, down_EHI, order_R, gate_up_RJ = ctx.saved_tensors
        shape, parts = weight_Tk.shape, ctx.groups.parts(len(x_TH))
        is_one = len(parts) == 1
        token_R, weight_R = order_R // shape[1], _by_row(weight_Tk, order_R)
        grad_x_TH, grad_RH = x_TH if is_one else torch.zeros_like(x_TH), x_TH
        found: list[Sequence[Any]] = []
        for rows, experts, group in parts:
            weights = gate_up_EJH[experts], down_EHI[experts]
            given = grads[0], x_TH, token_R[rows], weight_R[rows], gate_up_RJ if is_one else None
            grad_RH, *others = rows_backward(ctx, group, *weights, *given)
            found.append(others)
            if not is_one:
                grad_x_TH.index_add_(0, token_R[rows], grad_RH)
        if is_one:
            grad_x_TH = _sum_by_token(grad_RH, order_R, shape)
        joined: list[Any] = [
            None if grad[0] is None else grad[0] if is_one else torch.cat(grad)
            for grad in zip(*found, strict=True)
        ]
        grad_weight_R, grad_gate_up_EJH, grad_down_EHI = joined
        grad_weight_Tk = torch.empty_like(weight_R).scatter_(0, order_R, grad_weight_R).view(shape)
        return grad_x_TH, grad_weight_Tk, grad_gate_up_EJH, grad_down_EHI, None, None


def rows_backward(
    ctx: Any,
    groups: Groups,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    grad_TH: Tensor,
    x_TH: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    gate_up_RJ: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of rows of x, their weights, and the experts' matrices; gate and up are formed
    where they are not given."""
    serving: Serving = ctx.serving
    gate_up = rounded(gate_up_EJH, x_TH, serving)
    if gate_up_RJ is None:
        gate_up_RJ = groups.times(x_TH.index_select(0, token_R), gate_up.mT)
    grad_RH = grad_TH.index_select(0, token_R)
    grad_hidden_RI = groups.times(grad_RH, rounded(down_EHI, x_TH, serving))
    given = grad_hidden_RI, gate_up_RJ, weight_R, serving.limit
    hidden_RI, grad_weight_R, through = weighted_backward(*given)
    del given, grad_hidden_RI
    hidden_RI = fake_fp8_activation(hidden_RI) if serving.rounds_inputs else hidden_RI
    grad_down_EHI = groups.outer(grad_RH, hidden_RI) if ctx.needs_input_grad[3] else None
    del grad_RH, hidden_RI  # the step's memory is at its peak here
    grad_RJ = through()
    del through
    grad_gate_up_EJH = None
    if ctx.needs_input_grad[2]:
        grad_gate_up_EJH = groups.outer(grad_RJ, x_TH.index_select(0, token_R))
    return groups.times(grad_RJ, gate_up), grad_weight_R, grad_gate_up_EJH, grad_down_EHI


def rounded(weight_EAB: Tensor, x_TH: Tensor, serving: Serving) -> Tensor:
    """The weights that x meets; rounded ones are formed again in the backward: those of all layers
    together are as large as the masters."""
    return fake_mxfp4(weight_EAB).to(x_TH.dtype) if serving.rounds_weights else weight_EAB


class Groups:
    """Rows sorted by expert, and products of each expert's rows: one grouped GEMM on GPU, where
    counts never leave the device; one GEMM an expert on CPU."""

    def __init__(
        self, expert_R: Tensor, num_experts: int, *, is_grouped: bool | None = None
    ) -> None:
        self.is_grouped = expert_R.is_cuda if is_grouped is None else is_grouped
        name_E = torch.arange(num_experts, device=expert_R.device)
        self.end_E = torch.searchsorted(expert_R, name_E, right=True, out_int32=True)
        ends = [] if self.is_grouped else self.end_E.tolist()
        self.sizes = [end - first for first, end in pairwise([0, *ends])]

    def parts(self, num_tokens: int) -> list[tuple[slice, slice, Groups]]:
        """What is done at once, rows, experts and their groups: all, or of a long batch on CPU one
        expert, so that no (R, ...) tensor exists."""
        if self.is_grouped or num_tokens <= again.KEPT:
            return [(slice(None), slice(None), self)]
        ends = [0, *accumulate(self.sizes)]
        return [
            (slice(*span), slice(e, e + 1), Groups(self.end_E.new_zeros(span[1] - span[0]), 1))
            for e, span in enumerate(pairwise(ends))
        ]

    def times(self, rows_RA: Tensor, matrix_EAB: Tensor) -> Tensor:
        """rows[r] @ matrix[expert of r], (R, B)."""
        if self.is_grouped:
            return grouped_mm(rows_RA, matrix_EAB, offs=self.end_E)
        out_RB = rows_RA.new_empty(len(rows_RA), matrix_EAB.shape[2])
        split = rows_RA.split(self.sizes), matrix_EAB.unbind(0), out_RB.split(self.sizes)
        for rows_XA, matrix_AB, out_XB in zip(*split, strict=True):
            torch.mm(rows_XA, matrix_AB, out=out_XB)
        return out_RB

    def outer(self, left_RA: Tensor, right_RB: Tensor) -> Tensor:
        """left^T @ right over each expert's rows, (E, A, B); zeros for one without a row."""
        if self.is_grouped:
            return grouped_mm(left_RA.mT, right_RB, offs=self.end_E)
        out_EAB = left_RA.new_empty(len(self.sizes), left_RA.shape[1], right_RB.shape[1])
        split = left_RA.split(self.sizes), right_RB.split(self.sizes), out_EAB.unbind(0)
        for left_XA, right_XB, out_AB in zip(*split, strict=True):
            torch.mm(left_XA.T, right_XB, out=out_AB)
        return out_EAB


def _by_row(weight_Tk: Tensor, order_R: Tensor) -> Tensor:
    return weight_Tk.flatten().index_select(0, order_R)


def _sum_by_token(rows_RH: Tensor, order_R: Tensor, shape: torch.Size) -> Tensor:
    """The k rows of each token added, (T, H): by gathers, so that the order of the sum is fixed
    on GPU too."""
    row_R = torch.arange(len(order_R), device=order_R.device)
    place_kT = torch.empty_like(row_R).scatter_(0, order_R, row_R).view(shape).T.contiguous()
    out_TH = rows_RH.index_select(0, place_kT[0])
    for place_T in place_kT[1:]:
        out_TH.add_(rows_RH.index_select(0, place_T))
    return out_TH
