"""Prompts go where the gap is larger: bounded, smoothed, and by logged numbers alone."""

import json
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_runs import assert_same_run, opd_stage, work_until

from distill.allocation import (
    GapDeal,
    bounded_shares,
    completed,
    kl_gaps,
    score_gaps,
    smoothed,
)
from distill.config import DistillConfig
from distill.opd import work
from posttrain.job import Job

DOMAINS: tuple[str, ...] = ("a", "b", "c")
Records = list[dict[str, Any]]


def deal(history: Records, *, lag: int = 0, prompts_per_step: int = 10, **how: float) -> GapDeal:
    bounds = {"floor": 0.5, "ceiling": 2.0, "smoothing": 0.5, **how}
    gaps = partial(kl_gaps, domains=DOMAINS)
    return GapDeal(DOMAINS, prompts_per_step, history, gaps=gaps, lag=lag, **bounds)


def drawn(num_steps: int, seed: int = 0) -> Records:
    """Records of KLs between 0 and 1."""
    generator = random.Random(seed)
    return [{f"kl/{domain}": generator.random() for domain in DOMAINS} for _ in range(num_steps)]


def counts(given: GapDeal, step: int) -> list[int]:
    before, after = given.before(step), given.before(step + 1)
    return [after[domain] - before[domain] for domain in DOMAINS]


def test_shares_are_in_proportion_between_floor_and_ceiling_by_hand() -> None:
    # of 10 the even share is 1/4, so shares lie between 1/8 and 1/2. 8/10 and 0 are out of bounds;
    # what these leave, 1 - 1/2 - 1/8 = 3/8, is for the other two, which are alike
    found = bounded_shares({"a": 8.0, "b": 1.0, "c": 1.0, "d": 0.0}, floor=0.5, ceiling=2.0)
    assert found == pytest.approx({"a": 1 / 2, "b": 3 / 16, "c": 3 / 16, "d": 1 / 8}, abs=1e-12)
    inside = bounded_shares({"a": 3.0, "b": 2.0, "c": 1.0}, floor=0.1, ceiling=3.0)
    assert inside == pytest.approx({"a": 1 / 2, "b": 1 / 3, "c": 1 / 6}, abs=1e-12)
    nothing = bounded_shares({"a": 0.0, "b": 0.0}, floor=0.5, ceiling=2.0)
    assert nothing == {"a": 1 / 2, "b": 1 / 2}


def test_shares_sum_to_one_and_keep_the_order_of_the_gaps_whatever_they_are() -> None:
    generator = random.Random(1)
    for _ in range(200):
        gaps = {f"d{i}": generator.choice([0.0, generator.random() ** 9]) for i in range(7)}
        floor, ceiling = generator.uniform(0.01, 1), generator.uniform(1, 9)
        shares = bounded_shares(gaps, floor=floor, ceiling=ceiling)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-9)
        assert min(shares.values()) >= floor / 7 - 1e-12
        assert max(shares.values()) <= ceiling / 7 + 1e-12
        order = sorted(gaps, key=lambda domain: gaps[domain])
        assert all(shares[x] <= shares[y] for x, y in pairwise(order))


def test_gaps_are_smoothed_and_what_is_not_known_changes_none() -> None:
    # 1, then 0.75 * 1 + 0.25 * 3; a KL below zero is rounding
    first = smoothed({}, kl_gaps({"kl/a": 1.0, "kl/b": -1e-9}, domains=DOMAINS), 0.75)
    assert first == {"a": 1.0, "b": 0.0}
    record = {"kl/a": 3.0, "kl/b": None, "kl/c": float("nan")}
    after = smoothed(first, kl_gaps(record, domains=DOMAINS), 0.75)
    assert after == {"a": 1.5, "b": 0.0}
    assert completed(after, DOMAINS) == {"a": 1.5, "b": 0.0, "c": 0.75}
    assert completed({}, DOMAINS) == dict.fromkeys(DOMAINS, 1.0)


def test_the_first_steps_are_dealt_evenly_and_then_by_the_gaps() -> None:
    # gaps 3 : 2 : 1 of 12 prompts, within the bounds of 2 and 8
    history: Records = [{"kl/a": 0.3, "kl/b": 0.2, "kl/c": 0.1}] * 3
    given = deal(history, prompts_per_step=12)
    assert [counts(given, step) for step in range(3)] == [[4, 4, 4], [6, 4, 2], [6, 4, 2]]


@pytest.mark.parametrize("prompts_per_step", [1, 7, 40])
def test_every_step_has_all_its_prompts_and_every_domain_its_share_of_them_in_the_long_run(
    prompts_per_step: int,
) -> None:
    history = drawn(60)
    given = deal(history, prompts_per_step=prompts_per_step)
    owed = dict.fromkeys(DOMAINS, 0.0)
    gaps: dict[str, float] = {}
    for step in range(60):
        assert sum(counts(given, step)) == prompts_per_step
        shares = bounded_shares(completed(gaps, DOMAINS), floor=0.5, ceiling=2.0)
        for domain, share in shares.items():
            owed[domain] += share * prompts_per_step
            assert abs(given.before(step + 1)[domain] - owed[domain]) < len(DOMAINS)
        gaps = smoothed(gaps, kl_gaps(history[step], domains=DOMAINS), 0.5)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_deal_is_the_same_asked_step_by_step_or_at_once_and_knows_no_later_step(lag: int) -> None:
    whole = drawn(30)
    growing: Records = []
    live = deal(growing, lag=lag)
    for step in range(30):
        resumed = deal(whole[: max(step - lag, 0)], lag=lag)  # no more is learned by then
        assert resumed.before(step + 1) == live.before(step + 1)
        growing.append(whole[step])
    assert live.before(30) == deal(whole, lag=lag).before(30)
    assert live.before(30) != deal(drawn(30, seed=1), lag=lag).before(30)


def test_more_prompts_are_refused_where_they_would_be_more_loss() -> None:
    for denominator in ("token", "sequence"):
        with pytest.raises(ValidationError, match=f"with denominator {denominator} a domain's"):
            DistillConfig.model_validate({"allocation": {"by": "kl"}, "denominator": denominator})
    with pytest.raises(ValidationError, match="ceiling"):
        DistillConfig.model_validate({"allocation": {"by": "kl", "ceiling": 0.9}})


@pytest.mark.parametrize("depth", [0, 1])
def test_a_killed_run_deals_the_prompts_that_a_straight_one_deals(
    depth: int,
    make_job: Callable[[str], Job],
) -> None:
    how = {"by": "kl", "floor": 0.2, "ceiling": 1.8, "smoothing": 0.0}
    asked = opd_stage(
        allocation=how,
        max_staleness=depth,
        prompts_per_step=10,
        num_steps=5,
        start="specialist/code",  # which has nothing to learn: a tenth of the prompts
    )
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    work_until(asked, broken, 4)
    work(asked, broken)
    assert_same_run(broken, straight)
    records = straight.metrics.records()
    dealt = [[record[f"prompts/{name}"] for name in ("mathematics", "code")] for record in records]
    assert dealt[: depth + 1] == [[5, 5]] * (depth + 1)
    assert dealt[depth + 1] == [9, 1]
    for record in records:  # half the loss each, whatever its prompts
        halves = 0.5 * record["kl/mathematics"] + 0.5 * record["kl/code"]
        assert record["loss"] == pytest.approx(halves, rel=1e-6)


def test_a_score_that_is_ahead_of_the_teachers_leaves_no_gap_by_hand() -> None:
    targets = {"a": 0.9, "b": 0.5}
    found = score_gaps({"score/a": 0.5, "score/b": 0.75, "score/macro": 0.6}, targets=targets)
    assert found == {"a": 0.4, "b": -0.25}
    assert smoothed({"a": 0.2}, found, 0.5) == pytest.approx({"a": 0.3, "b": 0.0})
    assert score_gaps({"kl/a": 0.5}, targets=targets) == {}  # a step that is not scored


def test_a_gap_in_scores_needs_scores() -> None:
    with pytest.raises(ValidationError, match="by is score and evaluate_every 0"):
        DistillConfig.model_validate({"allocation": {"by": "score"}})


REWARD = """
def reward(response, **row):
    return sum(ord(letter) % 4 for letter in response) / (3 * len(response)) if response else 0.5
"""


@pytest.mark.parametrize("dies_at", [2, 4])
def test_prompts_go_where_the_score_is_furthest_below_the_teachers(
    make_job: Callable[[str], Job], tmp_path: Path, dies_at: int
) -> None:
    """The student is the teacher of code: with the same seeds it answers alike, and has no gap."""
    (tmp_path / "letters.py").write_text(REWARD)
    asked = opd_stage(
        allocation={"by": "score", "floor": 0.2, "ceiling": 1.8, "smoothing": 0.0},
        evaluate_every=2,
        evaluate_prompts=4,
        prompts_per_step=10,
        num_steps=6,
        start="specialist/code",
        optimizer={"learning_rate": 1e-30},
    )
    specs = [spec.model_copy(update={"reward": "letters:reward"}) for spec in asked.domains]
    asked = asked.model_copy(update={"domains": specs})
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    targets = json.loads((straight.out / "teacher_scores.json").read_text())
    records = straight.metrics.records()
    assert records[0]["step"] == 0
    gaps = {name: target - records[0][f"score/{name}"] for name, target in targets.items()}
    assert gaps["code"] == 0
    assert gaps["mathematics"] > 0.01
    dealt = [[r[f"prompts/{name}"] for name in ("mathematics", "code")] for r in records[1:]]
    assert dealt == [[5, 5]] * 2 + [[9, 1]] * 4  # the first score is after the second step
    work_until(asked, broken, dies_at)
    work(asked, broken)
    assert_same_run(broken, straight)
