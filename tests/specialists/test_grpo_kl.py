"""The KL to a reference that is not the policy, on answers of a sampler that is neither: K3 of each
token times its ratio, by hand."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import ANSWERS, OFFSETS, Case, logps, off_policy
from torch import Tensor

from posttrain.domains import DomainSpec
from posttrain.job import Job

WEIGHT = 0.5
ALIKE = (1.0, 1.0, 1.0, 1.0)
"""Rewards without an advantage, so that the KL alone trains."""


@pytest.fixture
def case(start: Path, tokenizer: Any, words: DomainSpec, new_job: Callable[..., Job]) -> Case:
    return Case(start, tokenizer, words, new_job("grpo"))


def moved(model: Any) -> Any:
    """The same model with other weights."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return model


def test_the_kl_is_k3_times_the_ratio_to_the_sampler_in_value_and_gradient(case: Case) -> None:
    rollouts = off_policy(case)
    found = case.gradient(
        rollouts,
        rewards=ALIKE,
        prepare=lambda trainer: moved(trainer.ref_model),
        steps_per_sampling=2,
        kl_weight=WEIGHT,
    )
    policy, reference = case.model().double(), moved(case.model()).double()
    losses: list[Tensor] = []
    kls: list[float] = []
    gaps: list[float] = []
    for rollout in rollouts:
        logp, told = logps(policy, rollout), logps(reference, rollout).tolist()
        slopes, kl = [0.0] * len(told), 0.0
        for t, p in enumerate(logp.tolist()):
            if rollout.is_own[t]:
                ratio, gap = math.exp(p - rollout.logp[t]), told[t] - p  # of the reference
                kl += ratio * (math.exp(gap) - gap - 1)
                # d/dp of exp(p - s) (exp(q - p) - (q - p) - 1) = ratio (exp(gap) - gap - 1)
                # + ratio (1 - exp(gap)) = -ratio gap: the importance-weighted gradient of the KL
                slopes[t] = -ratio * gap
                gaps.append(gap)
        kls.append(kl)
        losses.append((WEIGHT * torch.tensor(slopes, dtype=torch.float64) * logp).sum())
    sizes = [sum(own) for _, _, own in ANSWERS]
    (torch.stack(losses).sum() * 2 / sum(sizes)).backward()  # each step divides by half of them
    wanted = {n: p.grad.float() for n, p in policy.named_parameters() if p.grad is not None}
    assert max(abs(gap) for gap in gaps) > 0.05
    assert max(map(abs, OFFSETS)) > 0.5  # nor is the ratio 1
    assert max(part.abs().max() for part in wanted.values()) > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    logged = [record["kl"] for record in case.records()]
    dealt = [  # TRL deals a sampling's four rows out over its two steps at random
        [(kls[i] + kls[j]) / (sizes[i] + sizes[j]) for i, j in (half, set(range(4)) - set(half))]
        for half in combinations(range(4), 2)
    ]
    assert any(logged == pytest.approx(step, rel=1e-4) for step in dealt)
