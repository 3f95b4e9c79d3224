"""Routed experts kept in MXFP4 for inference: 4.25 bits a number, dequantised on use.

The numbers are those of `fp4.fake_mxfp4` on the master weights, bit for bit, so a packed model
computes what the quantisation-aware one was trained to compute. The weights themselves get no
gradient; what goes through them does, so adapters elsewhere can be trained.

Legend: E experts, U of them dequantised, O output rows, I input columns; T tokens, k experts a
token, H hidden size, J twice the hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from posttrain.backbone.experts import run_experts
from posttrain.backbone.fake_quant import rounds
from posttrain.backbone.fp4 import E8M0, GROUP, dequantize_mxfp4, quantize_mxfp4
from posttrain.backbone.kernels import use_kernels


class PackedWeight(nn.Module):
    """Weights (E, O, I) in MXFP4; indexed by expert, as the tensor would be."""

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int, int], *, dtype: torch.dtype, device: Any) -> None:
        """Room for codes and scales, not yet filled.

        Args:
            shape: (E, O, I), I a multiple of 32.
            dtype: what an expert is dequantised to.
        """
        super().__init__()
        experts, rows, columns = shape
        if columns % GROUP:
            raise ValueError(f"{columns} input columns do not divide into groups of {GROUP}")
        empty = torch.zeros(experts, rows, columns // 2, dtype=torch.int8, device=device)
        self.register_buffer("codes", empty)
        # bytes, not E8M0: that counts as a float, and model.to(bfloat16) would double its size
        empty = torch.zeros(experts, rows, columns // GROUP, dtype=torch.uint8, device=device)
        self.register_buffer("scale", empty)
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: int) -> Tensor:
        """One expert's weight (O, I)."""
        scale = self.scale[expert].view(E8M0)
        return dequantize_mxfp4(self.codes[expert], scale, dtype=self.dtype)

    def some(self, experts: Iterable[int] | Tensor) -> Tensor:
        """Several experts' weights (U, O, I), in one tensor: at once if their names are a tensor,
        which the host never reads; else one after the other, in little memory."""
        if isinstance(experts, Tensor):
            scale = self.scale[experts].view(E8M0)
            return dequantize_mxfp4(self.codes[experts], scale, dtype=self.dtype)
        chosen = list(experts)
        out = torch.empty(len(chosen), *self.shape[1:], dtype=self.dtype, device=self.codes.device)
        for place, expert in enumerate(chosen):
            out[place] = self[expert]
        return out

    @torch.no_grad()
    def put(self, expert: int, rows: slice, codes: Tensor, scale: Tensor) -> None:
        """Take an expert's rows: codes (O', I / 2) int8, scales (O', I / 32) E8M0."""
        self.codes[expert, rows] = codes.to(self.codes.device)
        self.scale[expert, rows] = scale.view(torch.uint8).to(self.scale.device)


@dataclass(frozen=True, slots=True)
class UsedExperts:
    """Experts that some tokens chose, dequantised: what `run_experts` reads of experts."""

    gate_up_proj: Tensor
    """(U, J, H)."""
    down_proj: Tensor
    """(U, H, J / 2)."""
    num_experts: int
    limit: float


class PackedExperts(nn.Module):
    """In the place of a block's experts. Who reads `gate_up_proj` gets all of them dequantised,
    a layer's at a time; a forward dequantises only those that are needed."""

    def __init__(self, experts: Any) -> None:
        """Room for the packed form of `experts`, a stock DeepseekV4Experts; not yet filled."""
        super().__init__()
        self.config = getattr(experts, "config", None)
        self.num_experts: int = experts.num_experts
        self.limit: float = experts.limit
        self.gate_up = _room(experts.gate_up_proj)
        self.down = _room(experts.down_proj)

    @property
    def gate_up_proj(self) -> Tensor:
        """(E, J, H)."""
        return self.gate_up.some(self._all_names())

    @property
    def down_proj(self) -> Tensor:
        """(E, H, J / 2)."""
        return self.down.some(self._all_names())

    def forward(self, x_TH: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """What `V4Experts` gives, (T, H)."""
        used, place_Tk = self.used(expert_Tk)
        rounds_inputs = rounds(self.config, "activations")
        return run_experts(used, x_TH, place_Tk, weight_Tk, rounds_inputs=rounds_inputs)

    def used(self, expert_Tk: Tensor) -> tuple[UsedExperts, Tensor]:
        """The experts in `expert_Tk` and the same choices as places among them, (T, k). In the
        order of their names, so that sorted rows, and with them all bits, stay as they are."""
        if use_kernels(expert_Tk):
            names, place_Tk = places_of(expert_Tk, self.num_experts)
        else:
            name_U, place_Tk = expert_Tk.unique(return_inverse=True)
            names = name_U.tolist() or [0]  # without tokens, one to have a shape
        gate_up, down = self.gate_up.some(names), self.down.some(names)
        return UsedExperts(gate_up, down, len(names), self.limit), place_Tk

    def _all_names(self) -> Iterable[int] | Tensor:
        codes = self.gate_up.codes
        if use_kernels(codes):
            return torch.arange(self.num_experts, device=codes.device)
        return range(self.num_experts)


def places_of(expert_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The names (U,) of the experts in `expert_Tk`, ascending, and where each choice stands among
    them, (T, k), without asking the GPU how many there are: U is the most there can be, and names
    past the last are 0, where no choice points."""
    name_E = torch.arange(num_experts, device=expert_Tk.device)
    most = max(expert_Tk.numel(), 1)
    if most >= num_experts:
        return name_E, expert_Tk
    is_used_E = (expert_Tk.flatten().unsqueeze(1) == name_E).any(0)
    name_U = name_E.masked_fill(~is_used_E, num_experts).sort().values[:most]
    name_U = name_U.masked_fill(name_U == num_experts, 0)
    return name_U, (is_used_E.cumsum(0) - 1)[expert_Tk]


def pack_experts(model: nn.Module, *, is_filled: bool = True) -> None:
    """Put MXFP4 experts in the place of every block's, quantised from their weights.

    Args:
        model: a V4ForCausalLM or a part of one; changed in place.
        is_filled: False leaves the new weights zero, for a loader that fills them.
    """
    for block in [m for m in model.modules() if _has_unpacked(m)]:
        experts = cast("Any", block).experts
        packed = PackedExperts(experts)
        if is_filled:
            for weight, target in (
                (experts.gate_up_proj, packed.gate_up),
                (experts.down_proj, packed.down),
            ):
                for expert in range(len(weight)):
                    target.put(expert, slice(None), *quantize_mxfp4(weight[expert]))
        cast("Any", block).experts = packed


def _has_unpacked(module: nn.Module) -> bool:
    experts = getattr(module, "experts", None)
    return hasattr(experts, "gate_up_proj") and not isinstance(experts, PackedExperts)


def _room(weight: Tensor) -> PackedWeight:
    experts, rows, columns = weight.shape
    return PackedWeight((experts, rows, columns), dtype=weight.dtype, device=weight.device)
