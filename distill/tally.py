"""A step's metrics: what is summed over each domain's tokens, on every rank, and what it comes to.

The tokens that the student sampled and those that a teacher did are summed apart.

Shapes: N loss tokens, n teachers, D domains, K columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.batch import Group, MicroBatch
from distill.mesh import Mesh

COLUMNS = ("kl", "divergence", "entropy", "loss", "squared_gradient", "sampler_gap", "tokens")


class Tally:
    """Sums of one step."""

    def __init__(self, domains: Sequence[str], mesh: Mesh) -> None:
        self._domains, self._mesh = domains, mesh
        self._own_DK, self._taught_DK = self._zeros(len(COLUMNS)), self._zeros(len(COLUMNS))
        self._largest_gap_D = self._zeros(1)[:, 0]
        self._by_teacher: dict[str, Tensor] = {}
        """(D, 2): of the student's own tokens the sum of the KL to this teacher, and their number;
        where a token has several."""

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
        own_N1, domain_N = ~batch.by_teacher_N[:, None], batch.domain_N
        self._own_DK.index_add_(0, domain_N, columns_NK.where(own_N1, 0.0))
        self._taught_DK.index_add_(0, domain_N, columns_NK.where(~own_N1, 0.0))
        self._largest_gap_D.scatter_reduce_(0, domain_N, gap_N.where(own_N1[:, 0], 0.0), "amax")

    def add_teachers(self, batch: MicroBatch, group: Group, per_teacher_Nn: Tensor) -> None:
        """Tokens that several teachers read, and the KL to each of them."""
        own_N = ~batch.by_teacher_N[group.tokens]
        domain_N = batch.domain_N[group.tokens][own_N]
        for teacher, kl_N in zip(group.teachers, per_teacher_Nn[own_N].double().T, strict=True):
            sums_D2 = self._by_teacher.setdefault(teacher, self._zeros(2))
            sums_D2.index_add_(0, domain_N, torch.stack([kl_N, torch.ones_like(kl_N)], dim=-1))

    def metrics(self, *, is_ablation: bool) -> dict[str, Tensor]:
        """Over all ranks, by name, `kl/<domain>` and so on for the domains present; nats a token.

        `kl` is the reverse KL to the weighted teachers, `kl/<domain>/<teacher>` that to one where
        there are several, `divergence` what an ablation minimises in its place; `share` is a
        domain's share of the loss, `token_share` of the tokens, `grad_share` of the norms of the
        loss's gradient at the hidden states of its tokens, each of which is `hidden_grad`;
        `sampler_gap` is the mean of |log p of the student - log p of its sampler| over the sampled
        tokens, `sampler_gap_max` the largest. The shares and `hidden_grad` are of all tokens, the
        others of those that the student sampled; those of the teachers have `off_policy_kl` and so
        on.
        """
        own_DK, taught_DK = self._mesh.sum(self._own_DK), self._mesh.sum(self._taught_DK)
        return {
            **self._shares(named(own_DK + taught_DK)),
            **self._means(named(own_DK), "", is_ablation=is_ablation),
            **self._means(named(taught_DK), "off_policy_", is_ablation=is_ablation),
            **self._sampler_gap(named(own_DK)),
            **self._teacher_metrics(),
        }

    def _shares(self, of: dict[str, Tensor]) -> dict[str, Tensor]:
        loss, norm_D = of["loss"].sum(), of["squared_gradient"].sqrt()
        columns = {
            "share": of["loss"] / _or_one(loss),
            "token_share": of["tokens"] / _or_one(of["tokens"].sum()),
            "grad_share": norm_D / _or_one(norm_D.sum()),
            "hidden_grad": norm_D,
        }
        return {"loss": loss, **self._by_domain(columns, of["tokens"])}

    def _means(self, of: dict[str, Tensor], prefix: str, *, is_ablation: bool) -> dict[str, Tensor]:
        tokens_D = of["tokens"]
        if not tokens_D.any():
            return {}
        names = ("kl", "entropy", *(["divergence"] if is_ablation else []))
        columns = {f"{prefix}{name}": of[name] / tokens_D for name in names}
        mean = columns[f"{prefix}kl"][tokens_D > 0].mean()
        columns[f"{prefix}tokens"] = tokens_D
        return {f"{prefix}kl": mean, **self._by_domain(columns, tokens_D)}

    def _sampler_gap(self, of: dict[str, Tensor]) -> dict[str, Tensor]:
        largest_D, tokens_D = self._mesh.largest(self._largest_gap_D), of["tokens"]
        if not tokens_D.any():
            return {}
        columns = {"sampler_gap": of["sampler_gap"] / tokens_D, "sampler_gap_max": largest_D}
        mean = of["sampler_gap"].sum() / tokens_D.sum()
        whole = {"sampler_gap": mean, "sampler_gap_max": largest_D.max()}
        return {**whole, **self._by_domain(columns, tokens_D)}

    def _by_domain(self, columns: dict[str, Tensor], tokens_D: Tensor) -> dict[str, Tensor]:
        """`name/<domain>` for the domains that have tokens."""
        present = [(d, name) for d, name in enumerate(self._domains) if tokens_D[d] > 0]
        return {
            f"{column}/{domain}": values_D[d]
            for column, values_D in columns.items()
            for d, domain in present
        }

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


def named(sums_DK: Tensor) -> dict[str, Tensor]:
    """Its columns (D,)."""
    return dict(zip(COLUMNS, sums_DK.T, strict=True))


def _or_one(total: Tensor) -> Tensor:
    """What to divide by, where nothing may be there."""
    return torch.where(total == 0, 1.0, total)
