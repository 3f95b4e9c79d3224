"""How far the student that learns is from the one that sampled, token by token."""

from collections.abc import Callable

import pytest
import torch
from small_runs import opd_stage, work_until

from distill.causal_lm import token_logits
from distill.kept_rollouts import KeptRollouts
from distill.opd import work
from distill.reverse_kl import Head
from posttrain.job import Job


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_tokens_logit_from_its_row_of_the_head_is_that_of_the_whole(has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((11, 6), (29, 6)))
    bias = torch.randn(29, generator=generator) if has_bias else None
    token = torch.randint(29, (11,), generator=generator)
    wanted = 0.3 * torch.nn.functional.linear(hidden, weight, bias)[range(11), token]
    found = token_logits(hidden, Head(weight, bias, 0.3), token)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_gap_is_rounding_where_the_sampler_is_the_student_and_more_where_it_is_older(
    make_job: Callable[[str], Job],
) -> None:
    fresh, stale = make_job("fresh"), make_job("stale")
    for job, depth in ((fresh, 0), (stale, 1)):
        work(opd_stage(num_steps=2, max_staleness=depth), job)
    gaps = [
        [record["sampler_gap_max"] for record in job.metrics.records()] for job in (fresh, stale)
    ]
    (one, two), (first, second) = gaps
    assert max(one, two, first) < 1e-4
    assert second > 1e-3  # one update apart


@pytest.mark.parametrize(("depth", "num_workers"), [(0, 0), (1, 0), (2, 1)])
def test_no_token_is_older_than_the_staleness_allows(
    make_job: Callable[[str], Job],
    depth: int,
    num_workers: int,
) -> None:
    job = make_job("stale")
    asked = opd_stage(
        max_staleness=depth, num_rollout_workers=num_workers, checkpoint_every=9, num_steps=5
    )
    work_until(asked, job, 5)
    kept = KeptRollouts(job.out / "rollouts")
    for step in range(5):
        rollouts = kept.find(step)
        assert rollouts
        ages = [step - version for r in rollouts for version in r.token_versions]
        assert set(ages) == {min(step, depth)}
    found = [record["staleness_max"] for record in job.metrics.records()]
    assert found == [min(step, depth) for step in range(4)]
