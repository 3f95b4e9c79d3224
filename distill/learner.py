"""One training step of on-policy distillation: count, forward, loss, backward, clip, step, metrics.

    L = sum over all tokens of the global batch of weight_n * KL(student || teacher)_n

or another divergence of the two where it is asked for.

Shapes: B rows, S padded length, N loss tokens, D domains, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.balance import Denominator, Totals, token_weights
from distill.batch import MicroBatch, ScoredExample, microbatches
from distill.causal_lm import head_weight, hidden_states
from distill.divergences import Kind, divergence
from distill.mesh import Mesh
from distill.reverse_kl import ReverseKL, reverse_kl
from posttrain.backbone.auxiliary import scale_own_losses

SUMS = ("kl", "divergence", "entropy", "loss", "squared_gradient", "tokens")
"""What is summed over each domain's tokens."""


class Student(nn.Module):
    """A causal language model, as far as the loss needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head_weight(model, name="the student")
        self.model = model

    def forward(self, batch: MicroBatch, share: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states that predict the loss tokens (N, H), and the head (V, H). `share` of the
        step's tokens are in this batch, times the ranks over which gradients are averaged."""
        scale_own_losses(self.model, share)
        hidden_BSH = hidden_states(self.model, batch.input_ids_BS, batch.attention_mask_BS)
        head_VH = self.model.get_output_embeddings().weight
        # a view, so that DDP finds the head in the graph of this forward's outputs
        return hidden_BSH.flatten(0, 1)[batch.position_N], head_VH.view_as(head_VH)


class Learner:
    """Owns the student's updates. `model` is trained in place."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        *,
        shares: Mapping[str, float],
        head: Callable[[str], Tensor],
        denominator: Denominator = "domain",
        divergence: Kind = "reverse_kl",
        beta: float = 0.5,
        top_k: int = 32,
        temperature: float = 1.0,
        rows_per_microbatch: int = 64,
        max_grad_norm: float = 1.0,
    ) -> None:
        """`shares` gives each domain its share of the loss, in any unit; `head(teacher)` a
        teacher's head (V, Hi); `beta` and `top_k` belong to the divergences of those names."""
        self.mesh = Mesh()
        self.student, self.optimizer = self.mesh.prepare(Student(model), optimizer)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.domains = list(shares)
        self.share_D = self._tensor(list(shares.values()))
        self.head = head
        self.denominator: Denominator = denominator
        self.kind: Kind = divergence
        self.options = {"beta": beta, "top_k": top_k}
        self.temperature = temperature
        self.rows_per_microbatch = rows_per_microbatch
        self.max_grad_norm = max_grad_norm

    def step(
        self, rows: Sequence[ScoredExample], *, learning_rate_factor: float = 1.0
    ) -> dict[str, Tensor]:
        """One update on this rank's rows, at least one; the step's metrics over all ranks.

        Raises FloatingPointError, before the update, where the loss or its gradient is not finite.
        """
        totals = self._count(rows)
        batches = list(microbatches(rows, num_rows=self.rows_per_microbatch, domains=self.domains))
        sums_DK = self._tensor([[0.0] * len(SUMS)] * len(self.domains))
        self.student.train()
        for i, batch in enumerate(batch.to(self.mesh.device) for batch in batches):
            with self.mesh.accumulate(self.student, is_last=i == len(batches) - 1):
                sums_DK += self._learn(batch, totals)
        scale_own_losses(self.student, None)  # another trainer's of this model find it as it was
        grad_norm = self.mesh.clip_grad_norm(self.student, self.max_grad_norm)
        if not grad_norm.isfinite():
            raise FloatingPointError(
                f"the gradient's norm is {grad_norm.item()}: nothing was updated; a lower "
                "learning rate is the usual remedy"
            )
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * learning_rate_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": grad_norm, **self._metrics(self.mesh.sum(sums_DK))}

    def _count(self, rows: Sequence[ScoredExample]) -> Totals:
        """Loss tokens by domain, rows, and all tokens, over all ranks."""
        counts = [0] * len(self.domains)
        for row in rows:
            counts[self.domains.index(row.example.domain)] += len(row.example.positions)
        num_inputs = sum(len(row.example.input_ids) for row in rows)
        total = self.mesh.sum(self._tensor([*counts, len(rows), num_inputs]))
        return Totals(tokens_D=total[:-2], num_rows=total[-2], num_inputs=total[-1])

    def _learn(self, batch: MicroBatch, totals: Totals) -> Tensor:
        """Forward, loss and backward of one micro-batch; its sums by domain, (D, K)."""
        weight_N = token_weights(
            self.denominator,
            domain_N=batch.domain_N,
            row_tokens_N=batch.row_tokens_N,
            share_D=self.share_D,
            totals=totals,
        )
        share = batch.attention_mask_BS.sum() / totals.num_inputs * self.mesh.size
        hidden_NH, head_VH = self.student(batch, share.float())
        hidden_NH.retain_grad()
        compared = [
            self._compare(
                hidden_NH[tokens],
                head_VH,
                (teacher_NH, self.head(teacher).to(teacher_NH.device)),
                row_weight=weight_N[tokens],
                sampled=batch.sampled_N[tokens],
            )
            for teacher, tokens, teacher_NH in batch.groups
        ]
        self.mesh.backward(torch.stack([found.loss for found, _ in compared]).sum())
        divergence_N = torch.cat([found.per_token for found, _ in compared]).double()
        kl_N = torch.cat([kl_N for _, kl_N in compared]).double()
        entropy_N = torch.cat([found.entropy for found, _ in compared]).double()
        assert hidden_NH.grad is not None
        gradient_N = hidden_NH.grad.double().square().sum(dim=-1) / self.mesh.size**2
        loss_N, one_N = weight_N * divergence_N, torch.ones_like(kl_N)
        columns = (kl_N, divergence_N, entropy_N, loss_N, gradient_N, one_N)
        sums_DK = self.share_D.new_zeros(len(self.domains), len(SUMS))
        return sums_DK.index_add_(0, batch.domain_N, torch.stack(columns, dim=-1))

    def _compare(
        self,
        hidden_NH: Tensor,
        head_VH: Tensor,
        teacher: tuple[Tensor, Tensor],
        *,
        row_weight: Tensor,
        sampled: Tensor,
    ) -> tuple[ReverseKL, Tensor]:
        """What is minimised, and the reverse KL (N,), whether or not that is it."""
        options: Any = {"row_weight": row_weight, "temperature": self.temperature}
        if self.kind == "reverse_kl":
            found = reverse_kl(hidden_NH, head_VH, [teacher], **options)
            return found, found.per_token
        with torch.no_grad():
            kl = reverse_kl(hidden_NH, head_VH, [teacher], **options)
        options |= {"sampled": sampled, **self.options}
        return divergence(self.kind, hidden_NH, head_VH, [teacher], **options), kl.per_token

    def _metrics(self, sums_DK: Tensor) -> dict[str, Tensor]:
        """By name, `kl/<domain>` and so on for the domains present; all in nats a token.

        `kl` is the reverse KL, `divergence` what is minimised in its place, if anything; `share` is
        a domain's share of the loss, `hidden_grad` the norm of the loss's gradient at the hidden
        states of its tokens.
        """
        total_loss = sums_DK[:, SUMS.index("loss")].sum()
        whole = torch.where(total_loss == 0, 1.0, total_loss)
        metrics = {"loss": total_loss}
        for domain, row_K in zip(self.domains, sums_DK, strict=True):
            sums = dict(zip(SUMS, row_K, strict=True))
            if sums["tokens"] > 0:
                metrics[f"kl/{domain}"] = sums["kl"] / sums["tokens"]
                if self.kind != "reverse_kl":
                    metrics[f"divergence/{domain}"] = sums["divergence"] / sums["tokens"]
                metrics[f"entropy/{domain}"] = sums["entropy"] / sums["tokens"]
                metrics[f"share/{domain}"] = sums["loss"] / whole
                metrics[f"hidden_grad/{domain}"] = sums["squared_gradient"].sqrt()
                metrics[f"tokens/{domain}"] = sums["tokens"]
        kls = [value for name, value in metrics.items() if name.startswith("kl/")]
        return {"kl": torch.stack(kls).mean(), **metrics}

    def _tensor(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
