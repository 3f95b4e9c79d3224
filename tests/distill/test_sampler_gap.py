"""How far the student that learns is from the one that sampled, token by token."""

from collections.abc import Callable

import pytest
import torch
from small_runs import opd_stage, work_until

from distill.causal_lm import token_logp
from distill.kept_rollouts import KeptRollouts
from distill.opd import work
from posttrain.job import Job


def test_a_tokens_logp_from_its_row_of_the_head_equals_the_whole_softmax() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(*size, generator=generator) for size in ((11, 6), (29, 6)))
    token = torch.randint(29, (11,), generator=generator)
    logits = hidden.double() @ head.double().T / 0.7
    found = token_logp(hidden, head, token, logsumexp_N=logits.logsumexp(-1), temperature=0.7)
    wanted = logits.log_softmax(-1)[range(11), token]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


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
