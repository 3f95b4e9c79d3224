"""GRPO on scripted rollouts: its gradient beside that of a loss for each row."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from posttrain.backbone.routing import ExpertChoices
from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.rollout.types import Rollout
from specialists import grpo, training
from specialists.config import GrpoConfig, GrpoStage
from specialists.groups import as_trl

STILL = OptimizerConfig(learning_rate=1e-12, max_grad_norm=1e9)
"""Weights that stay, so that the gradients of two steps are of the same ones."""


def stage(domains: list[DomainSpec], **settings: Any) -> GrpoStage:
    defaults = {
        "num_steps": 2, "prompts_per_step": 1, "samples_per_prompt": 2, "num_slots": 6,
        "optimizer": STILL, "temperature": 0.7,
    }  # fmt: skip
    return GrpoStage(domains=domains, grpo=GrpoConfig.model_validate({**defaults, **settings}))


REWARDS = (1.0, 0.0, 0.5, 0.0)
ADVANTAGES = (0.5, -0.5, 0.25, -0.25)
ANSWERS = (  # the third is cut: it has no EOS
    ([40, 41, 42], [60, 61, 1], [True, True, True]),
    ([40, 41, 42], [60, 90, 91, 62, 63, 1], [True, False, False, True, True, True]),
    ([50], [64, 65], [True, True]),
    ([50], [66, 1], [True, True]),
)


def rollouts_of(**fields: Sequence[Any]) -> list[Rollout]:
    found = [
        Rollout("p", "words", 0, prompt, response, is_own, [0.0] * len(response))
        for prompt, response, is_own in ANSWERS
    ]
    for name, values in fields.items():
        found = [replace(r, **{name: v}) for r, v in zip(found, values, strict=True)]
    return found


class Scripted:
    """In a sampler's place."""

    visits = tuple(range(2))

    def __init__(self, rollouts: list[Rollout], rewards: Sequence[float] = REWARDS) -> None:
        self.rollouts, self.rewards = rollouts, rewards

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        return as_trl(self.rollouts, self.rewards)


def logps(
    model: Any, rollout: Rollout, *, allowed: Sequence[Sequence[int]] = (), routes: Any = None
) -> Tensor:
    """log p of the response at temperature 0.7, the row alone and without padding."""
    replay = None
    if routes is not None:
        replay = ExpertChoices(torch.as_tensor(np.array(routes)).permute(1, 0, 2))
    ids = [*rollout.prompt, *rollout.response]
    logits = model(torch.tensor([ids]), replay_routes=replay).logits[0] / 0.7
    found: list[Tensor] = []
    for t, token in enumerate(rollout.response):
        row = logits[len(rollout.prompt) + t - 1]
        if allowed and allowed[t]:
            found.append(row[token] - row[list(allowed[t])].logsumexp(0))
        else:
            found.append(row.log_softmax(-1)[token])
    return torch.stack(found)


class GradientSum(TrainerCallback):
    """Over the steps, of what the optimizer takes."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                before = self.total.get(name, torch.zeros_like(parameter))
                self.total[name] = before + parameter.grad


class Case:
    """Trains on scripted rollouts, and compares with a loss for each row."""

    def __init__(self, start: Path, tokenizer: Any, words: DomainSpec, job: Job) -> None:
        self.start, self.tokenizer, self.words, self.job = start, tokenizer, words, job

    def model(self) -> Any:
        return load_model(self.start / "checkpoint")

    def gradient(
        self,
        rollouts: list[Rollout],
        *,
        rewards: Sequence[float] = REWARDS,
        prepare: Callable[[Any], None] = lambda trainer: None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        config = stage([self.words], **settings)
        scripted: Any = Scripted(rollouts, rewards)
        trainer: Any = grpo.build_trainer(self.model(), self.tokenizer, scripted, config, self.job)
        prepare(trainer)
        trainer.add_callback(found := GradientSum())
        training.run(trainer, self.job, self.tokenizer)
        return found.total

    def records(self) -> list[dict[str, Any]]:
        return [record for record in self.job.metrics.records() if record["step"] > 0]

    def check(
        self,
        found: dict[str, Tensor],
        rollouts: list[Rollout],
        loss_of: Callable[[Any, Rollout, float], Tensor],
        *,
        num_steps: int,
    ) -> None:
        """`loss_of(model, rollout, advantage)` is a loss for each response token; each of
        `num_steps` steps divides by its share of the own tokens."""
        model = self.model()
        terms = [
            (loss_of(model, r, a) * torch.tensor(r.is_own)).sum()
            for r, a in zip(rollouts, ADVANTAGES, strict=True)
        ]
        num_own = sum(sum(r.is_own) for r in rollouts)
        (torch.stack(terms).sum() * num_steps / num_own).backward()
        wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert max(part.abs().max() for part in wanted.values()) > 1e-4
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


OFFSETS = (-0.6, -0.1, 0.0, 0.1, 0.6, 0.2)
"""By how much the sampler's log-probability is above the learner's, in turn."""


def off_policy(case: Case) -> list[Rollout]:
    """Rollouts of a sampler that is some way from the learner."""
    model, plain = case.model(), rollouts_of()
    found: list[list[float]] = []
    for number, rollout in enumerate(plain):
        offset = [OFFSETS[(t + 3 * number) % 6] for t in range(len(rollout.response))]
        with torch.no_grad():
            logp = logps(model, rollout) + torch.tensor(offset)
        found.append(logp.tolist())
    return rollouts_of(logp=found)


def clipped(logp: Tensor, rollout: Rollout, advantage: float) -> Tensor:
    ratio = (logp - torch.tensor(rollout.logp)).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 0.28) * advantage)
