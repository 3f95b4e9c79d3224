"""Rollouts that go on under newer weights: who samples which token, and what is learned of it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from small_runs import assert_same_run, opd_stage, work_until

from distill.batch import example_from_rollout
from distill.config import OpdStage
from distill.kept_rollouts import KeptRollouts
from distill.opd import work
from distill.staleness import describe_staleness, fresh_from, whole
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.rollout.types import Rollout

OLD = Rollout(
    "p",
    "mathematics",
    version=2,
    prompt=[5, 9],
    response=[4, 8, 7, 6, 3],
    is_own=[True, False, True, True, True],
    logp=[-0.1, 0.0, -0.3, -0.4, -0.5],
    versions=[2, 2, 3, 5, 5],
)


def stage(part: int | None, staleness: int, **more: Any) -> OpdStage:
    """Six steps of six prompts, each of whose answers is of four tokens or fewer."""
    how: dict[str, Any] = {"num_steps": 6, "max_staleness": staleness, **more}
    return opd_stage(partial_rollout_tokens=part, **how)


def sampled(job: Job, asked: OpdStage) -> list[list[Rollout]]:
    """What each step sampled, the last one not logged."""
    num_steps = asked.distill.num_steps
    work_until(asked, job, num_steps)
    kept = KeptRollouts(job.out / "rollouts")
    found = [kept.find(step) for step in range(num_steps)]
    assert all(rollouts is not None for rollouts in found)
    return [rollouts or [] for rollouts in found]


def test_tokens_older_than_allowed_are_no_part_of_the_loss_by_hand() -> None:
    assert [fresh_from(OLD, oldest) for oldest in range(7)] == [0, 0, 0, 2, 3, 3, 5]
    learned = slice(fresh_from(OLD, 3), 5)
    example = example_from_rollout(OLD, teachers={"t": 1.0}, learned=learned)
    assert example is not None
    assert example.input_ids == [5, 9, 4, 8, 7, 6]  # what is too old is still read
    assert (example.positions, example.sampled) == ([3, 4, 5], [7, 6, 3])
    assert example.sampler_logp == [-0.3, -0.4, -0.5]
    told = describe_staleness([OLD], version=6, learned=lambda _: learned)
    assert told == {"staleness": (3 + 1 + 1) / 3, "staleness_max": 3, "stale_tokens": 1}
    assert example_from_rollout(OLD, teachers={"t": 1.0}, learned=slice(5, 5)) is None
    told = describe_staleness([OLD], version=9, learned=lambda _: slice(5, 5))
    assert told == {"staleness": 0, "staleness_max": 0, "stale_tokens": 4}
    assert whole(OLD) == slice(0, 5)


@pytest.mark.parametrize(
    ("part", "staleness", "num_workers"), [(1, 0, 0), (1, 2, 0), (2, 1, 1), (3, 3, 0)]
)
def test_a_step_samples_each_rollouts_next_part_and_learns_what_is_fresh_of_those_that_end(
    make_job: Callable[[str], Job], part: int, staleness: int, num_workers: int
) -> None:
    job = make_job("parts")
    asked = stage(part, staleness, num_rollout_workers=num_workers, checkpoint_every=9)
    steps = sampled(job, asked)
    ahead, last = min(staleness, 1), len(steps) - 1
    began: dict[tuple[str, int], int] = {}
    learned_in = Counter[tuple[str, int]]()
    for step, rollouts in enumerate(steps):
        learned = stale = ended = 0
        for rollout in rollouts:
            key = rollout.prompt_id, rollout.sample
            first = began.setdefault(key, step)
            by = [max(min(first + t // part, last) - ahead, 0) for t in range(4)]
            assert rollout.token_versions == by[: len(rollout.response)]
            if rollout.finish_reason == "paused":
                assert len(rollout.response) == part * (step - first + 1)
                continue
            learned_in[key] += 1
            ended += 1
            ages = [step - version for version in rollout.token_versions]
            stale += sum(age > staleness for age in ages)
            learned += sum(age <= staleness for age in ages)
        if step < last:  # the last one is not logged
            told = job.metrics.records()[step]
            assert told["stale_tokens"] == stale
            assert told["paused"] == len(rollouts) - ended
            assert sum(told.get(f"prompts/{d}", 0) for d in ("mathematics", "code")) == ended
            assert told["staleness_max"] <= staleness
            before = job.metrics.records()[step - 1]["tokens_seen"] if step else 0
            assert told["tokens_seen"] - before == learned
    assert learned_in == dict.fromkeys(began, 1)  # each prompt's answer once, none left over
    assert len(began) == 6 * len(steps)
    assert any(r.finish_reason == "paused" for r in steps[0])


def test_weights_that_stay_sample_in_parts_what_they_sample_whole(
    make_job: Callable[[str], Job],
) -> None:
    still: dict[str, Any] = {"optimizer": {"learning_rate": 1e-30}, "checkpoint_every": 9}
    whole_ones, parts = (
        {
            (r.domain, r.prompt_id, r.sample): (r.response, r.logp)
            for rollouts in sampled(make_job(str(part)), stage(part, 9, **still))
            for r in rollouts
            if r.finish_reason != "paused"
        }
        for part in (None, 3)
    )
    assert parts == whole_ones


@pytest.mark.parametrize(("part", "staleness", "dies_at"), [(1, 0, 3), (2, 2, 4), (1, 3, 5)])
def test_a_killed_run_goes_on_with_what_had_paused(
    make_job: Callable[[str], Job], part: int, staleness: int, dies_at: int
) -> None:
    straight, killed = make_job("straight"), make_job("killed")
    work(stage(part, staleness), straight)
    work_until(stage(part, staleness), killed, dies_at)
    work(stage(part, staleness), killed)
    assert_same_run(killed, straight)


def test_a_run_whose_paused_rollouts_are_gone_says_so(make_job: Callable[[str], Job]) -> None:
    job = make_job("lost")
    work_until(stage(1, 0), job, 3)
    for path in (job.out / "rollouts").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"rollouts of step 1 are gone from .*delete that"):
        work(stage(1, 0), job)


def test_a_pool_of_samplers_pauses_and_goes_on_alike(make_job: Callable[[str], Job]) -> None:
    one, two = make_job("one"), make_job("two")
    for job, num_workers in ((one, 1), (two, 2)):
        work(stage(2, 2, num_rollout_workers=num_workers), job)
    assert_same_run(two, one)
