"""The mixture of experts: tokens sorted by expert, one GEMM pair for each, and the hash table's
filling.

Legend: T tokens, H hidden size, k experts a token, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import maybe_autocast

from posttrain.backbone.balance import attach_balance
from posttrain.backbone.fake_quant import rounds
from posttrain.backbone.fp4 import fake_fp8_activation, fake_mxfp4
from posttrain.backbone.routing import RouteTape, route

grouped_mm: Any = getattr(F, "grouped_mm", None) or vars(torch)["_grouped_mm"]  # before 2.10


class Weights(NamedTuple):
    """All experts' weights of one layer."""

    gate_up_proj: Tensor
    down_proj: Tensor
    limit: float


class V4Experts(stock.DeepseekV4Experts):
    """Stock's parameters. A module that is called: PEFT's `target_parameters` put their weights in
    place for the time of the call."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, x_TH: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, H), chosen experts and their weights (T, k) -> (T, H)."""
        rounds_inputs = rounds(self.config, "activations")
        return run_experts(self.served(), x_TH, expert_Tk, weight_Tk, rounds_inputs=rounds_inputs)

    def served(self) -> Any:
        """The weights as serving has them: these, or rounded where that is trained for."""
        if not rounds(self.config, "experts"):
            return self
        own: Any = self
        return Weights(fake_mxfp4(own.gate_up_proj), fake_mxfp4(own.down_proj), own.limit)


class V4SparseMoeBlock(stock.DeepseekV4SparseMoeBlock):
    """Stock's router, experts and shared expert over flat tokens."""

    def __init__(self, config: DeepseekV4Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.experts = V4Experts(config)

    def forward(self, x_TH: Tensor, token_id_T: Tensor, context: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, H), token ids (T,) for hash layers -> (T, H), the balance loss attached where it
        is wanted. `context` is the forward's; one decode step's has neither tape nor losses."""
        tape: RouteTape | None = getattr(context, "tape", None)
        replay_Tk = tape.replay(self.layer_idx) if tape else None
        routes = route(self.gate, x_TH, token_id_T, is_hash=self.is_hash, replay_Tk=replay_Tk)
        if tape:
            tape.record(self.layer_idx, self.gate, routes, is_hash=self.is_hash)
        out_TH = self.experts(x_TH, routes.expert_Tk, routes.weight_Tk)
        out_TH = out_TH + self.shared_experts(x_TH)
        scale = getattr(context, "balance_loss_scale", None)
        if scale is None or self.is_hash:
            return out_TH
        top_k = routes.expert_Tk.shape[1]
        return attach_balance(out_TH, routes.score_TE, context.documents, k=top_k, scale=scale)


def run_experts(
    experts: Any,
    x_TH: Tensor,
    expert_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    rounds_inputs: bool = False,
) -> Tensor:
    """sum_j weight[t, j] * expert[t, j](x[t]), (T, H). Every expert takes part, with no rows if
    need be, so that every expert has a gradient on every rank. `rounds_inputs`: of both matrices,
    to FP8 and back (fake_quant.py)."""
    device = x_TH.device.type
    is_cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_cast else x_TH.dtype
    gate_up, down = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    x_TH = fake_fp8_activation(x_TH) if rounds_inputs else x_TH
    with maybe_autocast(device_type=device, enabled=False):
        out_TH: Any = RoutedExperts.apply(
            x_TH.to(dtype), weight_Tk, gate_up, down, expert_Tk, experts.limit, rounds_inputs
        )
    return out_TH


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
        limit: float,
        rounds_inputs: bool,
    ) -> Tensor:
        expert_R, order_R = expert_Tk.flatten().sort(stable=True)
        groups = Groups(expert_R, len(gate_up_EJH))
        token_R = order_R // expert_Tk.shape[1]
        gate_up_RJ = groups.times(x_TH.index_select(0, token_R), gate_up_EJH.mT)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
        hidden_RI = swiglu(gate_RI, up_RI, limit).mul_(_column(weight_Tk, order_R))
        hidden_RI = fake_fp8_activation(hidden_RI) if rounds_inputs else hidden_RI
        out_RH = groups.times(hidden_RI, down_EHI.mT)
        ctx.save_for_backward(x_TH, weight_Tk, gate_up_EJH, down_EHI, order_R, gate_up_RJ)
        ctx.groups, ctx.limit, ctx.rounds_inputs = groups, limit, rounds_inputs
        return _sum_by_token(out_RH, order_R, expert_Tk.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TH, weight_Tk, gate_up_EJH, down_EHI, order_R, gate_up_RJ = ctx.saved_tensors
        groups, shape = ctx.groups, weight_Tk.shape
        token_R = order_R // shape[1]
        grad_RH, weight_R1 = grads[0].index_select(0, token_R), _column(weight_Tk, order_R)
        gate_RI, up_RI = gate_up_RJ.chunk(2, dim=1)
        hidden_RI = swiglu(gate_RI, up_RI, ctx.limit)
        grad_hidden_RI = groups.times(grad_RH, down_EHI)
        grad_weight_R = (grad_hidden_RI * hidden_RI).sum(-1).to(weight_Tk.dtype)
        hidden_RI.mul_(weight_R1)
        hidden_RI = fake_fp8_activation(hidden_RI) if ctx.rounds_inputs else hidden_RI
        grad_down_EHI = groups.outer(grad_RH, hidden_RI) if ctx.needs_input_grad[3] else None
        grad_RJ, grad_hidden_RI = torch.empty_like(gate_up_RJ), grad_hidden_RI.mul_(weight_R1)
        out = grad_RJ.chunk(2, dim=1)
        swiglu_backward(grad_hidden_RI, gate_RI, up_RI, ctx.limit, out=out)
        grad_gate_up_EJH = None
        if ctx.needs_input_grad[2]:
            grad_gate_up_EJH = groups.outer(grad_RJ, x_TH.index_select(0, token_R))
        grad_x_TH = _sum_by_token(groups.times(grad_RJ, gate_up_EJH), order_R, shape)
        grad_weight_Tk = torch.empty_like(grad_weight_R).scatter_(0, order_R, grad_weight_R)
        grad_weight_Tk = grad_weight_Tk.view(shape)
        return grad_x_TH, grad_weight_Tk, grad_gate_up_EJH, grad_down_EHI, None, None, None


class Groups:
    """Rows sorted by expert, and products of each expert's rows: one grouped GEMM on GPU, where
    counts never leave the device; one GEMM an expert on CPU."""

    def __init__(
        self, expert_R: Tensor, num_experts: int, *, is_grouped: bool | None = None
    ) -> None:
        self.is_grouped = expert_R.is_cuda if is_grouped is None else is_grouped
        name_E = torch.arange(num_experts, device=expert_R.device)
        self.end_E = torch.searchsorted(expert_R, name_E, right=True, out_int32=True)
        self.ends = [] if self.is_grouped else self.end_E.tolist()

    def times(self, rows_RA: Tensor, matrix_EAB: Tensor) -> Tensor:
        """rows[r] @ matrix[expert of r], (R, B)."""
        if self.is_grouped:
            return grouped_mm(rows_RA, matrix_EAB, offs=self.end_E)
        out_RB = rows_RA.new_empty(len(rows_RA), matrix_EAB.shape[2])
        for expert, rows in self._slices():
            torch.mm(rows_RA[rows], matrix_EAB[expert], out=out_RB[rows])
        return out_RB

    def outer(self, left_RA: Tensor, right_RB: Tensor) -> Tensor:
        """left^T @ right over each expert's rows, (E, A, B); zeros for one without a row."""
        if self.is_grouped:
            return grouped_mm(left_RA.mT, right_RB, offs=self.end_E)
        out_EAB = left_RA.new_empty(len(self.ends), left_RA.shape[1], right_RB.shape[1])
        for expert, rows in self._slices():
            torch.mm(left_RA[rows].T, right_RB[rows], out=out_EAB[expert])
        return out_EAB

    def _slices(self) -> Iterator[tuple[int, slice]]:
        return enumerate(map(slice, [0, *self.ends[:-1]], self.ends))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.clamp(max=limit), inplace=True).mul_(up.clamp(-limit, limit))


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, limit: float, *, out: Sequence[Tensor]
) -> None:
    """The gradients at `gate` and `up` into `out`; nothing passes where a clamp cut."""
    cut = gate.clamp(max=limit)
    torch.mul(F.silu(cut), grad, out=out[1]).mul_(up.abs() <= limit)
    through = torch.ops.aten.silu_backward(up.clamp(-limit, limit).mul_(grad), cut)
    torch.mul(through, gate <= limit, out=out[0])


class SwiGLU(torch.autograd.Function):
    """`swiglu` of the shared expert, whose projections stay modules that adapters can wrap."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return swiglu(gate, up, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        out = torch.empty_like(gate), torch.empty_like(up)
        swiglu_backward(grads[0], gate, up, ctx.limit, out=out)
        return *out, None


def run_shared(expert: Any, x_TH: Tensor) -> Tensor:
    """The expert that every token goes to, (T, H)."""
    return expert.down_proj(
        SwiGLU.apply(expert.gate_proj(x_TH), expert.up_proj(x_TH), expert.limit)
    )


def _column(weight_Tk: Tensor, order_R: Tensor) -> Tensor:
    return weight_Tk.flatten().index_select(0, order_R).unsqueeze(1)


def _sum_by_token(rows_RH: Tensor, order_R: Tensor, shape: torch.Size) -> Tensor:
    """The k rows of each token added, (T, H): by gathers, so that the order of the sum is fixed
    on GPU too."""
    row_R = torch.arange(len(order_R), device=order_R.device)
    place_kT = torch.empty_like(row_R).scatter_(0, order_R, row_R).view(shape).T.contiguous()
    out_TH = rows_RH.index_select(0, place_kT[0])
    for place_T in place_kT[1:]:
        out_TH.add_(rows_RH.index_select(0, place_T))
    return out_TH


def balanced_hash_table(vocab_size: int, top_k: int, num_experts: int) -> Tensor:
    """A `tid2eid` table (V, k) int64: k different experts a token, each expert's share of every
    column equal to one token. Drawn from torch's global generator, as weights are: seeded where
    the model is."""
    token_V = torch.randperm(vocab_size)
    table = torch.empty(vocab_size, top_k, dtype=torch.long)
    for block in token_V.split(num_experts):
        name_E, shift_k = torch.randperm(num_experts), torch.randperm(num_experts)[:top_k]
        table[block] = name_E[(torch.arange(len(block))[:, None] + shift_k) % num_experts]
    return table
