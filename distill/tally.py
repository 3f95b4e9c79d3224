"""A step's metrics: what is summed over each domain's tokens, on every rank, and what it comes to.

Shapes: N loss tokens, n teachers, D domains, K columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.batch import MicroBatch
from distill.mesh import Mesh

COLUMNS = ("kl", "divergence", "entropy", "loss", "squared_gradient", "sampler_gap", "tokens")


class Tally:
    """Sums of one step."""

    def __init__(self, domains: Sequence[str], mesh: Mesh) -> None:
        self._domains, self._mesh = domains, mesh
        self._sums_DK = self._zeros(len(COLUMNS))
        self._largest_gap_D = self._zeros(1)[:, 0]
        self._by_teacher: dict[str, Tensor] = {}
        """(D, 2): the sum of the KL to this teacher, and the tokens; where a token has several."""

    def add(
        self,
        batch: MicroBatch,
        *,
        kl: Tensor,
        divergence: Tensor,
        entropy: Tensor,
        weight: Tensor,
        squared_gradient: Tensor,
        logp: Tensor,
    ) -> None:
        """A micro-batch's tokens; all (N,). `logp` is what the student gives each of them."""
        gap_N = (logp - batch.sampler_logp_N).abs()
        columns = (
            *(kl, divergence, entropy, weight * divergence, squared_gradient, gap_N),
            torch.ones_like(weight),
        )
        columns_NK = torch.stack([column.double() for column in columns], dim=-1)
        self._sums_DK.index_add_(0, batch.domain_N, columns_NK)
        self._largest_gap_D.scatter_reduce_(0, batch.domain_N, gap_N, "amax")

    def add_teachers(
        self, teachers: Sequence[str], domain_N: Tensor, per_teacher_Nn: Tensor
    ) -> None:
        """Tokens that several teachers read, and the KL to each of them."""
        for teacher, kl_N in zip(teachers, per_teacher_Nn.double().T, strict=True):
            sums_D2 = self._by_teacher.setdefault(teacher, self._zeros(2))
            sums_D2.index_add_(0, domain_N, torch.stack([kl_N, torch.ones_like(kl_N)], dim=-1))

    def metrics(self, *, is_ablation: bool) -> dict[str, Tensor]:
        """Over all ranks, by name, `kl/<domain>` and so on for the domains present; nats a token.

        `kl` is the reverse KL to the weighted teachers, `kl/<domain>/<teacher>` that to one where
        there are several, `divergence` what an ablation minimises in its place; `share` is a
        domain's share of the loss, `token_share` of the tokens, `grad_share` of the norms of the
        loss's gradient at the hidden states of its tokens, each of which is `hidden_grad`;
        `sampler_gap` is the mean of |log p of the student - log p of its sampler| over the sampled
        tokens, `sampler_gap_max` the largest.
        """
        sums_DK = self._mesh.sum(self._sums_DK)
        of = dict(zip(COLUMNS, sums_DK.T, strict=True))
        loss, norm_D = of["loss"].sum(), of["squared_gradient"].sqrt()
        columns = {
            "kl": of["kl"] / of["tokens"],
            "entropy": of["entropy"] / of["tokens"],
            "share": of["loss"] / _or_one(loss),
            "token_share": of["tokens"] / _or_one(of["tokens"].sum()),
            "grad_share": norm_D / _or_one(norm_D.sum()),
            "hidden_grad": norm_D,
            "sampler_gap": of["sampler_gap"] / of["tokens"],
            "sampler_gap_max": self._mesh.largest(self._largest_gap_D),
            "tokens": of["tokens"],
        }
        if is_ablation:
            columns["divergence"] = of["divergence"] / of["tokens"]
        present = [d for d in range(len(self._domains)) if of["tokens"][d] > 0]
        metrics = {
            "loss": loss,
            "kl": columns["kl"][present].mean(),
            "sampler_gap": of["sampler_gap"].sum() / _or_one(of["tokens"].sum()),
            "sampler_gap_max": columns["sampler_gap_max"].max(),
        }
        for name, values_D in columns.items():
            metrics |= {f"{name}/{self._domains[d]}": values_D[d] for d in present}
        return metrics | self._teacher_metrics()

    def _teacher_metrics(self) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for teacher in self._mesh.union(self._by_teacher):
            sums_D2 = self._by_teacher.get(teacher)
            sums_D2 = self._mesh.sum(self._zeros(2) if sums_D2 is None else sums_D2)
            for domain, (kl, tokens) in zip(self._domains, sums_D2, strict=True):
                if tokens > 0:
                    metrics[f"kl/{domain}/{teacher}"] = kl / tokens
        return metrics

    def _zeros(self, num_columns: int) -> Tensor:
        shape = len(self._domains), num_columns
        return torch.zeros(shape, dtype=torch.float64, device=self._mesh.device)


def _or_one(total: Tensor) -> Tensor:
    """What to divide by, where nothing may be there."""
    return torch.where(total == 0, 1.0, total)
