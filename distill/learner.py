"""One training step of on-policy distillation: count, forward, loss, backward, clip, step, metrics.

    L = sum over all tokens n of the global batch of weight_n sum_i mixture_ni KL(student || i)_n

over the token's teachers i, or another divergence where it is asked for.

Shapes: B rows, S padded length, N loss tokens, D domains, V vocabulary, H hidden size.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.balance import Denominator, Totals, token_weights
from distill.batch import Group, MicroBatch, ScoredExample, cut_rows, make_microbatch
from distill.causal_lm import (
    check_logits,
    check_untied,
    hidden_states,
    model_head,
    token_logits,
)
from distill.divergences import Kind, divergence
from distill.guard import Guard
from distill.mesh import Mesh
from distill.reverse_kl import Head, ReverseKL, as_head, reverse_kl
from distill.tally import Tally
from distill.vocab_parallel import compare_over_ranks, logits_over_ranks
from posttrain.backbone.auxiliary import scale_own_losses

log = logging.getLogger(__name__)


class Student(nn.Module):
    """A causal language model, as far as the loss needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, share: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states that predict the loss tokens (N, H), and the head (V, H) and its bias (V),
        or where they stay in parts this rank's rows. `share` of the step's tokens are in this
        batch, times the ranks over which gradients are averaged."""
        scale_own_losses(self.model, share)
        hidden_BSH = hidden_states(self.model, batch.input_ids_BS, batch.attention_mask_BS)
        layer = self.model.get_output_embeddings()
        bias_V = getattr(layer, "bias", None)
        bias_V = None if bias_V is None else as_output(bias_V)
        return hidden_BSH.flatten(0, 1)[batch.position_N], as_output(layer.weight), bias_V


def as_output(parameter: Tensor) -> Tensor:
    """A view, so that DDP finds the parameter in the graph of a forward's outputs; of one in parts
    this rank's."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return own.view_as(own)


class Learner:
    """Owns the student's updates. `model` is trained in place."""

    def __init__(
        self,
        model: Any,
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        *,
        mesh: Mesh | None = None,
        shares: Mapping[str, float],
        head: Callable[[str], Tensor | Head],
        denominator: Denominator = "domain",
        divergence: Kind = "reverse_kl",
        beta: float = 0.5,
        top_k: int = 32,
        temperature: float = 1.0,
        rows_per_microbatch: int = 64,
        tokens_per_microbatch: int | None = None,
        max_grad_norm: float = 1.0,
        guard: Guard | None = None,
    ) -> None:
        """`make_optimizer(model)` is called once the model is where it is trained, its parameters
        in parts or not; `mesh` is this rank's, one rank by default. `shares` gives each domain its
        share of the loss, in any unit; `head(teacher)` reads a teacher's head to where the student
        is, (V, Hi) or with a bias and a scale; `beta` and `top_k` belong to the divergences of
        those names; `guard` decides which gradients are used."""
        self.mesh = mesh or Mesh()
        self.model = model
        own_head = model_head(model, name="the student")
        check_logits(model, own_head, name="the student")
        self.head_scale = own_head.scale
        if self.mesh.vocab_parallel and self.mesh.is_sharded:
            check_untied(model)
        self.vocab_rows = self.mesh.own_rows(len(own_head.weight))
        self.student, self.optimizer = self.mesh.prepare(
            Student(model),
            model._no_split_modules or (),
            lambda: make_optimizer(model),
            head=model.get_output_embeddings(),
        )
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.domains = list(shares)
        self.share_D = self._tensor(list(shares.values()))
        self.read_head = head
        self._heads: dict[str, Head] = {}
        self.denominator: Denominator = denominator
        self.kind: Kind = divergence
        self.options = {"beta": beta, "top_k": top_k}
        self.temperature = temperature
        self.rows_per_microbatch = rows_per_microbatch
        self.tokens_per_microbatch = tokens_per_microbatch
        self.max_grad_norm = max_grad_norm
        self.guard = guard or Guard()

    def weigh(self, shares: Mapping[str, float]) -> None:
        """From now on, each domain's share of the loss; of the domains that are not named none is
        expected."""
        self.share_D = self._tensor([shares.get(domain, 1.0) for domain in self.domains])

    def step(
        self, rows: Sequence[ScoredExample], *, learning_rate_factor: float = 1.0
    ) -> dict[str, Tensor]:
        """One update on this rank's rows, or none where the guard says so; the step's metrics over
        all ranks. Some rank has a row."""
        totals = self._count(rows)
        parts = cut_rows(
            rows, num_rows=self.rows_per_microbatch, num_tokens=self.tokens_per_microbatch
        )
        num_rounds = self.mesh.max(len(parts))
        parts += [[]] * (num_rounds - len(parts))
        tally = Tally(self.domains, self.mesh)
        self.student.train()
        with self.mesh.one_sum(self.optimizer):
            for i, part in enumerate(parts):
                # made as it is needed: it holds a copy of its rows' hidden states
                batch = make_microbatch(part, domains=self.domains).to(self.mesh.device)
                with self.mesh.accumulate(self.student, is_last=i == num_rounds - 1):
                    self._learn(batch, totals, tally)
        scale_own_losses(self.student, None)  # another trainer's of this model find it as it was
        grad_norm = self.mesh.clip_grad_norm(self.student, self.optimizer, self.max_grad_norm)
        self._update(grad_norm.item(), learning_rate_factor)
        is_warmup = any(row.example.is_warmup for row in rows)
        metrics = tally.metrics(is_ablation=is_warmup or self.kind != "reverse_kl")
        skipped = self._tensor(self.guard.num_skipped)
        rolled_back = self._tensor(self.guard.num_rolled_back)
        counts = {"updates_skipped": skipped, "rolled_back": rolled_back}
        return {"grad_norm": grad_norm, **counts, **metrics}

    def _update(self, grad_norm: float, learning_rate_factor: float) -> None:
        if self.guard.judge(grad_norm) == "update":
            for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
                group["lr"] = peak * learning_rate_factor
            self.optimizer.step()
        else:
            log.warning("nothing was updated: %s", self.guard.reason(grad_norm))
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """The student's whole state; all ranks call this."""
        return self.mesh.weights(self.model)

    def state(self) -> dict[str, Any]:
        """All that a resumed learner needs, whole; all ranks call this."""
        return {**self.mesh.state(self.model, self.optimizer), "guard": self.guard.state()}

    def load(self, path: Path, *, with_guard: bool) -> dict[str, Any]:
        """Go on from a file of `state()`, each rank from the whole of it; all that it holds."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.mesh.load(self.model, self.optimizer, state)
        if with_guard:
            self.guard.load(state["guard"])
        return state

    def _count(self, rows: Sequence[ScoredExample]) -> Totals:
        """Loss tokens by domain, rows, and all tokens, over all ranks."""
        counts = [0] * len(self.domains)
        for row in rows:
            counts[self.domains.index(row.example.domain)] += len(row.example.positions)
        num_inputs = sum(len(row.example.input_ids) for row in rows)
        total = self.mesh.sum(self._tensor([*counts, len(rows), num_inputs]))
        return Totals(tokens_D=total[:-2], num_rows=total[-2], num_inputs=total[-1])

    def _learn(self, batch: MicroBatch, totals: Totals, tally: Tally) -> None:
        """Forward, loss and backward of one micro-batch."""
        weight_N = token_weights(
            self.denominator,
            domain_N=batch.domain_N,
            row_tokens_N=batch.row_tokens_N,
            share_D=self.share_D,
            totals=totals,
        )
        share = batch.num_inputs / totals.num_inputs * self.mesh.size
        hidden_NH, weight_VH, bias_V = self.student(batch, share.float())
        own_head = self._own_rows(Head(weight_VH, bias_V, self.head_scale))
        hidden_NH.retain_grad()
        try:
            loss, compared = self._compare_all(hidden_NH, own_head, batch, weight_N)
        except FloatingPointError as error:
            log.warning("a loss that is not finite: %s", error)
            # the other ranks wait for this one's backward; no number is left that could be used
            self.mesh.backward(sum_of(hidden_NH, own_head) * math.nan)
            return
        # before the backward, after which a sharded head is gone
        logit_N = self._logits(hidden_NH, own_head, batch.sampled_N)
        self.mesh.backward(loss)
        if not batch.groups:
            return
        assert hidden_NH.grad is not None
        logsumexp_N = torch.cat([kl.logsumexp for _, kl in compared])
        tally.add(
            batch,
            kl=torch.cat([kl.per_token for _, kl in compared]),
            divergence=torch.cat([found.per_token for found, _ in compared]),
            entropy=torch.cat([kl.entropy for _, kl in compared]),
            weight=weight_N,
            squared_gradient=hidden_NH.grad.double().square().sum(dim=-1) / self.mesh.size**2,
            logp=logit_N.double() / self.temperature - logsumexp_N,
        )
        for group, (_, kl) in zip(batch.groups, compared, strict=True):
            if len(group.teachers) > 1:
                tally.add_teachers(batch, group, kl.per_teacher)

    def _heads_of(self, teachers: Sequence[str]) -> list[Head]:
        """Their heads, and no others in memory: rows come teacher by teacher, so that each is read
        once a step."""
        self._heads = {name: head for name, head in self._heads.items() if name in teachers}
        for name in teachers:
            if name not in self._heads:
                head = as_head(self.read_head(name))
                if self.mesh.vocab_parallel:
                    head = head.rows(self.vocab_rows)
                self._heads[name] = head.to(self.mesh.device)
        return [self._heads[name] for name in teachers]

    def _compare_all(
        self, hidden_NH: Tensor, head: Head, batch: MicroBatch, weight_N: Tensor
    ) -> tuple[Tensor, list[tuple[ReverseKL, ReverseKL]]]:
        """What the backward starts from, and by group what `_compare` gives."""
        if not self.mesh.vocab_parallel:
            compared = [
                self._compare(hidden_NH, head, batch, group, weight_N) for group in batch.groups
            ]
            if not compared:
                return sum_of(hidden_NH, head) * 0.0, []
            return torch.stack([found.loss for found, _ in compared]).sum(), compared
        loss, found = compare_over_ranks(
            hidden_NH,
            head,
            batch,
            weight_N,
            heads_of=self._heads_of,
            temperature=self.temperature,
            mesh=self.mesh,
        )
        return loss, [(kl, kl) for kl in found]

    def _own_rows(self, head: Head) -> Head:
        """This rank's rows of the head, and their gradient what `backward` makes of others'; all of
        it where the vocabulary is not shared out."""
        if not self.mesh.vocab_parallel:
            return head
        if not self.mesh.is_sharded:
            return head.map(lambda x: x[self.vocab_rows])
        # it is summed over nothing, where others' are averaged over the ranks
        own = head.map(lambda x: x.view_as(x))
        for x in own.tensors:
            x.register_hook(lambda grad: grad / self.mesh.size)
        return own

    def _logits(self, hidden_NH: Tensor, head: Head, token_N: Tensor) -> Tensor:
        """Of one token of each row, (N,)."""
        hidden_NH, head = hidden_NH.detach(), head.detach()
        if not self.mesh.vocab_parallel:
            return token_logits(hidden_NH, head, token_N)
        return logits_over_ranks(hidden_NH, head, token_N, self.vocab_rows, self.mesh)

    def _compare(
        self,
        hidden_NH: Tensor,
        head: Head,
        batch: MicroBatch,
        group: Group,
        weight_N: Tensor,
    ) -> tuple[ReverseKL, ReverseKL]:
        """Of a group's tokens what is minimised, and the reverse KL, whether or not that is it."""
        student = (hidden_NH[group.tokens], head)
        teachers = list(zip(group.hidden, self._heads_of(group.teachers), strict=True))
        options: Any = {
            "mixture": group.mixture_Nn,
            "row_weight": weight_N[group.tokens],
            "temperature": self.temperature,
        }
        kind = "forward_kl" if group.is_warmup else self.kind
        if kind == "reverse_kl":
            found = reverse_kl(*student, teachers, **options)
            return found, found
        with torch.no_grad():
            kl = reverse_kl(*student, teachers, **options)
        options |= {"sampled": batch.sampled_N[group.tokens], **self.options}
        return divergence(kind, *student, teachers, **options), kl

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.mesh.device)


def sum_of(hidden_NH: Tensor, head: Head) -> Tensor:
    """All that a forward gave out, in one number: whose backward reaches every parameter."""
    return torch.stack([x.sum() for x in (hidden_NH, *head.tensors)]).sum()
