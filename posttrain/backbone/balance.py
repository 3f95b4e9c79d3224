"""Experts kept equally busy: a bias that follows their load, and a small loss per document (V4
report 2.1, as in V3).

Bias (V3 report 2.1.2): after each optimiser step, b_i += speed * sign(mean load - load_i).
Loss (V3 report eqs. 17-20, with V4's scores s): for each document of T tokens

    sum_i f_i P_i,  f_i = E / (k T) * #{t : i in the top-k of s_t},
                    P_i = 1 / T * sum_t (s_ti / sum_j s_tj)

which is 1 where all experts are equally used and E / k where all tokens agree on k experts. f
counts the top-k of the scores without the bias, as eq. 18 has it, and has no gradient. Hash
layers, whose choice is a table, take part in neither.

Legend: T tokens, E experts, k experts a token, L layers, D documents.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from posttrain.backbone.auxiliary import attach
from posttrain.backbone.routing import ExpertChoices, gates, top_k
from posttrain.backbone.segments import Documents


def balance_loss(score_TE: Tensor, document_T: Tensor, length_D: Tensor, *, k: int) -> Tensor:
    """The loss of each document, (D,), whose documents are `document_T`'s values.

    A batch's loss weighs documents by their tokens: packed rows end in one-token pads."""
    num_experts = score_TE.shape[1]
    length_D1 = length_D.to(score_TE.dtype).clamp(min=1)[:, None]
    zeros_DE = score_TE.new_zeros(len(length_D), num_experts)
    share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
    mean_DE = zeros_DE.index_add(0, document_T, share_TE) / length_D1
    is_chosen_TE = torch.zeros_like(score_TE).scatter_(1, top_k(score_TE, k), 1.0)
    count_DE = zeros_DE.index_add(0, document_T, is_chosen_TE)
    return (count_DE * (num_experts / k) / length_D1 * mean_DE).sum(dim=-1)


def attach_balance(
    out_TH: Tensor, score_TE: Tensor, documents: Documents, *, k: int, scale: float | Tensor
) -> Tensor:
    """A layer's output, in whose backward its scores learn `scale` times the batch's balance loss:
    the mean over tokens, so that a document counts by its length."""
    loss_D = balance_loss(score_TE, documents.document_T, documents.length_D, k=k)
    mean = loss_D @ documents.length_D.to(loss_D.dtype) / max(len(score_TE), 1)
    return attach(out_TH, [mean], scale)


def expert_load(choices: ExpertChoices, num_experts: int) -> Tensor:
    """How many of the tokens went to each expert of each layer, (L, E) int64; -1 counts nowhere."""
    expert_LT = choices.expert_LTk.flatten(1).long()
    load_LE = expert_LT.new_zeros(len(expert_LT), num_experts + 1)
    load_LE.scatter_add_(1, expert_LT + 1, torch.ones_like(expert_LT))
    return load_LE[:, 1:]


@torch.no_grad()
def update_bias(gate: Any, load_E: Tensor, speed: float) -> None:
    """Move a gate's selection bias by `speed` towards the experts with less than the mean load.

    `load_E` is summed over the global batch, so that every data-parallel rank moves alike. Hash
    gates have no bias, and a frozen gate keeps its own."""
    if not hasattr(gate, "e_score_correction_bias") or not gate.weight.requires_grad:
        return
    bias_E = gate.e_score_correction_bias
    load_E = load_E.to(bias_E.device)
    # integers: sign(sum - E * load) has no rounding, so no rank can see another sign
    bias_E += speed * torch.sign(load_E.sum() - len(load_E) * load_E).to(bias_E.dtype)


def update_biases(model: nn.Module, load_LE: Tensor, speed: float) -> None:
    """`update_bias` on every layer of a model."""
    for gate, load_E in zip(gates(model), load_LE, strict=True):
        update_bias(gate, load_E, speed)


class LoadMeter:
    """Tokens by layer and expert, summed over the forwards since the last `take`.

    No buffer of the model: DDP copies rank 0's buffers over the other ranks' at each forward."""

    def __init__(self) -> None:
        self._load_LE: Tensor | None = None

    def add(self, choices: ExpertChoices, num_experts: int) -> None:
        """Count one forward; one without gradients (old log-probabilities) teaches nothing."""
        if not torch.is_grad_enabled():
            return
        load_LE = expert_load(choices, num_experts)
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    def take(self) -> Tensor | None:
        """The load over all ranks, (L, E), and start again; None where nothing was counted."""
        load_LE, self._load_LE = self._load_LE, None
        if load_LE is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(load_LE)
        return load_LE


class BalanceExperts(TrainerCallback):
    """For transformers' and TRL's trainers: with `callbacks=[BalanceExperts(1e-3)]` the biases move
    after each optimiser step by the load that the `load_meter`s counted since: the base model's,
    and that of the block of multi-token prediction, which counts where its own loss trains it."""

    def __init__(self, speed: float = 1e-3) -> None:
        """Args: speed: what a bias moves a step; V4 was trained with 1e-3."""
        self.speed = speed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in metered(kwargs["model"]):
            part.load_meter = LoadMeter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in metered(kwargs["model"]):
            load_LE = part.load_meter.take()
            if load_LE is not None:
                update_biases(part, load_LE, self.speed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for part in metered(kwargs["model"]):
            part.load_meter = None


def metered(model: nn.Module) -> list[Any]:
    """The modules with a `load_meter` in whatever wraps them, none of which holds another.

    Raises ValueError: there is none."""
    found = [module for module in model.modules() if "load_meter" in vars(module)]
    if not found:
        raise ValueError(
            f"BalanceExperts needs a V4, whose `load_meter` counts tokens by expert; {type(model)} "
            "has none: leave the callback out"
        )
    return found
