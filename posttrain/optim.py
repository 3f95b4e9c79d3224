"""Muon on matrices, AdamW on the rest, as one optimizer (V4 report 2.4).

Muon: momentum 0.95 with Nesterov, the update's nearest orthogonal matrix by a hybrid Newton-Schulz
iteration (eight fast steps, then two that converge), scaled to an RMS of 0.18 an element, so that
it shares AdamW's learning rate; decoupled weight decay. Expert weights (E, m, n) are E matrices.
A matrix in parts on several ranks is gathered, and every rank makes the whole update.
AdamW: embeddings, head, norms, sinks, compressor position biases, and mHC biases and gates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from posttrain.sharded import cut_like, whole

NEWTON_SCHULZ = (*((3.4445, -4.7750, 2.0315),) * 8, *((2.0, -1.5, 0.5),) * 2)
UPDATE_RMS = 0.18
TABLES = ("embed_tokens", "lm_head")
BIASES = ("position_bias",)
"""Matrices by shape alone."""


def orthogonalize(update: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each (..., m, n), by Newton-Schulz; float32 on CPU,
    bf16 on GPU."""
    x = update.to(
        torch.bfloat16 if update.is_cuda else torch.promote_types(update.dtype, torch.float32)
    )
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    shape = x.shape
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).reshape(-1, *shape[-2:])
    for a, b, c in NEWTON_SCHULZ:  # a x + (b G + c G G) x, G = x x^T: sums inside the products
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return (x.mT if is_tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Two kinds of parameter groups: `{"params", "kind": "muon" | "adamw"}`; one state_dict for
    all."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "kind": "muon",
        }
        super().__init__(list(groups), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["kind"] == "muon" else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in params:
            assert p.grad is not None
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 1 - group["momentum"])
            update = whole(p.grad.lerp(momentum, group["momentum"]))
            by_shape[p.shape[-2:], p.device, p.dtype].append((p, update))
        for pairs in by_shape.values():  # one batched iteration for all matrices of a shape
            stacked = torch.cat([update.reshape(-1, *update.shape[-2:]) for _, update in pairs])
            step = orthogonalize(stacked) * (UPDATE_RMS * math.sqrt(max(stacked.shape[-2:])))
            counts = [update[..., 0, 0].numel() for _, update in pairs]
            for (p, _), delta in zip(pairs, step.split(counts), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(cut_like(delta.view(p.shape), p), alpha=-group["lr"])

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros(()),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: 2-D and 3-D weights that multiply a token's vector."""
    return parameter.dim() >= 2 and not any(part in name for part in (*TABLES, *BIASES))


def is_table(name: str, parameter: Tensor) -> bool:
    """Whether it holds a vector for each token: AdamW's, with weight decay."""
    return parameter.dim() >= 2 and any(part in name for part in TABLES)


def build_optimizer(
    model: nn.Module,
    *,
    name: Literal["muon", "adamw"],
    learning_rate: float,
    weight_decay: float = 0.1,
) -> torch.optim.Optimizer:
    """One optimizer over the parameters of `model` that train; vectors and biases never decay."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in trained if is_matrix(n, p)]
    tables = [p for n, p in trained if is_table(n, p)]
    vectors = [p for n, p in trained if not is_matrix(n, p) and not is_table(n, p)]
    kinds = [
        ("muon", matrices, weight_decay),
        ("adamw", tables, weight_decay),
        ("adamw", vectors, 0.0),
    ]
    groups = [{"params": p, "kind": kind, "weight_decay": decay} for kind, p, decay in kinds if p]
    if name == "muon":
        return Muon(groups, lr=learning_rate, weight_decay=weight_decay)
    for group in groups:
        del group["kind"]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
