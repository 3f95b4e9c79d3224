"""Loops are found where they begin to repeat, and what only repeats can be left out."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from small_runs import assert_same_run, opd_stage, work_until

from distill.batch import example_from_rollout
from distill.endings import describe_endings, learned_until, loop_start
from distill.kept_rollouts import KeptRollouts
from distill.opd import work
from posttrain.job import Job
from posttrain.rollout.types import Rollout

WINDOW = 8


def rollout(response: list[int], *, finish_reason: str = "length", domain: str = "d") -> Rollout:
    """Its third token is a tool's."""
    is_own = [t != 2 for t in range(len(response))]
    logp = [-1.0] * len(response)
    return Rollout("p", domain, 0, [5, 6], response, is_own, logp, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("response", "start"),
    [
        ([7, 8, 9, 8, 9, 8, 9, 8, 9], 3),  # period 2: 8 9, and from index 3 on what was before
        ([1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4], 4),  # period 1
        ([4, 4, 4, 4, 4, 4, 4, 4], 1),  # nothing but the loop
        ([4, 4, 4, 4, 4, 4, 4], None),  # shorter than the window
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], None),  # a period of 3 is more than a quarter of 8
        ([8, 9, 8, 9, 8, 9, 8, 9, 1], None),  # it ended: a stop token, or other words
        ([7, 8, 9, 8, 9, 8, 9, 9, 8, 9, 8, 9], None),  # a slip in the window
        ([], None),
    ],
)
def test_where_a_loop_begins_to_repeat_by_hand(response: list[int], start: int | None) -> None:
    assert loop_start(response, WINDOW) == start


def test_a_loop_is_found_by_its_definition_whatever_its_period_and_what_precedes_it() -> None:
    generator = random.Random(4)
    num_found = 0
    for _ in range(400):
        window = generator.choice([4, 9, 16])
        pattern = [generator.randrange(3) for _ in range(generator.randint(1, 6))]
        head = [generator.randrange(3) for _ in range(generator.randint(0, 9))]
        response = head + (pattern * 30)[: generator.randint(0, 40)]
        is_loop = len(response) >= window and any(
            all(response[-i] == response[-i - period] for i in range(1, window - period + 1))
            for period in range(1, window // 4 + 1)
        )
        start = loop_start(response, window)
        assert (start is not None) == is_loop
        if start is not None:
            num_found += 1
            periods = [
                p
                for p in range(1, min(start, window // 4) + 1)
                if response[start:] == response[start - p : -p]
            ]
            assert periods  # all that is masked repeats
            (first, *_) = periods
            assert start == first or response[start - 1] != response[start - 1 - first]
    assert 50 < num_found < 350


def test_what_each_ending_leaves_by_hand() -> None:
    looped, cut = rollout([7, 8, 9, 8, 9, 8, 9, 8, 9]), rollout([1, 2, 3, 4])
    ended = rollout([1, 2, 3, 4], finish_reason="stop")
    wanted = {  # (looped, truncated): tokens of the looped, of the cut and of the ended rollout
        ("keep", "keep"): (9, 4, 4),
        ("mask", "keep"): (3, 4, 4),
        ("drop", "keep"): (0, 4, 4),
        ("mask", "drop"): (0, 0, 4),  # the loop was cut too
    }
    for (for_looped, for_cut), lengths in wanted.items():
        options: Any = {"looped": for_looped, "truncated": for_cut, "loop_window": WINDOW}
        until = partial(learned_until, **options)
        assert tuple(until(r) for r in (looped, cut, ended)) == lengths
    masked = example_from_rollout(looped, teachers={"t": 1.0}, learned=slice(3))
    assert masked is not None
    # prompt 5 6, then own 7 and 8, a tool's 9: predicted at 1 and 2, nothing read after
    assert (masked.input_ids, masked.positions, masked.sampled) == ([5, 6, 7], [1, 2], [7, 8])
    assert example_from_rollout(looped, teachers={"t": 1.0}, learned=slice(0)) is None


def test_endings_are_counted_by_domain_by_hand() -> None:
    rollouts = [
        rollout([7, 8, 9, 8, 9, 8, 9, 8, 9]),  # looped and cut; 6 of its 8 own tokens only repeat
        rollout([1, 2, 3, 4]),  # cut
        rollout([1, 2], finish_reason="stop"),
        rollout([1, 2], finish_reason="stop"),
        rollout([4] * 8, domain="e", finish_reason="stop"),  # looped; from 1 on, 6 own tokens
    ]
    until: Any = partial(learned_until, looped="mask", truncated="keep", loop_window=WINDOW)
    found = describe_endings(rollouts, until=until, loop_window=WINDOW)
    assert found == {
        "truncated/d": 0.5, "looped/d": 0.25, "masked_tokens/d": 6, "dropped/d": 0,
        "truncated/e": 0.0, "looped/e": 1.0, "masked_tokens/e": 6, "dropped/e": 0,
    }  # fmt: skip
    drop: Any = partial(learned_until, looped="drop", truncated="drop", loop_window=WINDOW)
    found = describe_endings(rollouts, until=drop, loop_window=WINDOW)
    assert (found["dropped/d"], found["masked_tokens/d"]) == (2, 8 + 3)
    assert (found["dropped/e"], found["masked_tokens/e"]) == (1, 7)


def test_a_killed_run_drops_what_a_straight_one_drops(
    make_job: Callable[[str], Job],
) -> None:
    asked = opd_stage(endings={"truncated": "drop", "looped": "mask", "loop_window": 4})
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    work_until(asked, broken, 4)
    sampled = KeptRollouts(broken.out / "rollouts").find(3)
    work(asked, broken)
    assert_same_run(broken, straight)
    assert sampled
    last = straight.metrics.records()[-1]
    for domain in ("mathematics", "code"):
        own = [r for r in sampled if r.domain == domain]
        num_cut = sum(r.finish_reason == "length" for r in own)
        assert last[f"dropped/{domain}"] == num_cut
        kept = [len(r.response) for r in own if r.finish_reason != "length"]
        assert last.get(f"tokens/{domain}", 0) == sum(kept)
    assert last["skipped"] == sum(r.finish_reason == "length" for r in sampled)
