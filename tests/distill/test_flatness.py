"""A run ends where every domain's KL has flattened, and not before; killed or not."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from small_runs import assert_same_run, opd_stage, without_time, work_until

from distill.config import DistillConfig
from distill.flatness import describe_flatness, is_stopped, relative_slope, steepest
from distill.opd import work
from posttrain.job import Job

Records = list[dict[str, Any]]


def test_relative_slopes_by_hand() -> None:
    # 1.0 0.9 0.8: -0.1 a step, over 3 steps 0.3 of a mean of 0.9
    assert relative_slope([(0, 1.0), (1, 0.9), (2, 0.8)], 3) == pytest.approx(1 / 3)
    assert relative_slope([(0, 0.8), (1, 0.9), (2, 1.0)], 3) == pytest.approx(1 / 3)  # rising too
    assert relative_slope([(0, 0.5), (3, 0.5)], 4) == 0
    assert relative_slope([(0, 0.0), (1, 0.0)], 2) == 0  # nothing is left to learn
    # 2 1 2 1 over t = 0 1 2 3: sum (t - 1.5)(y - 1.5) = -1 / sum (t - 1.5)^2 = 5; 0.2 * 4 / 1.5
    zigzag = [(0, 2.0), (1, 1.0), (2, 2.0), (3, 1.0)]
    assert relative_slope(zigzag, 4) == pytest.approx(0.8 / 1.5)


def test_the_line_is_the_least_squares_line() -> None:
    generator = random.Random(0)
    for _ in range(20):
        points = [(float(t), generator.random()) for t in range(9) if generator.random() < 0.8]
        slope, _ = np.polyfit(*zip(*points, strict=True), deg=1)
        mean = sum(y for _, y in points) / len(points)
        assert relative_slope(points, 9) == pytest.approx(abs(slope) * 9 / mean, rel=1e-6)


def test_the_domain_that_still_moves_decides_and_one_that_rests_does_not() -> None:
    moving: Records = [{"kl/a": 0.5, "kl/b": 1.0 - 0.1 * t} for t in range(3)]
    assert steepest(moving, ["a", "b"], 3) == pytest.approx(1 / 3)
    assert steepest(moving, ["a", "resting"], 3) == 0
    assert steepest(moving, ["resting"], 3) is None
    assert steepest(moving[:2], ["a"], 3) is None  # too few steps
    earlier: Records = [{"kl/a": 9.0, "kl/b": 9.0}, *moving]
    assert steepest(earlier, ["a", "b"], 3) == pytest.approx(1 / 3)  # the last ones alone
    holes: Records = [{"kl/a": 0.5}, {}, {"kl/a": None}, {"kl/a": float("nan")}]
    assert steepest(holes, ["a"], 4) is None  # one of four
    assert steepest([*holes, {"kl/a": 0.5}], ["a"], 4) is None
    assert steepest([{"kl/a": 0.5}, *holes], ["a"], 4) is None
    assert steepest([{"kl/a": 0.5}, {"kl/a": 0.5}, {}, {}], ["a"], 4) == 0


def test_a_run_is_stopped_by_its_last_record_alone() -> None:
    flat: Records = [{"kl/a": 0.5}] * 3
    found = describe_flatness(flat, ["a"], window=3, max_slope=0.1)
    assert found == {"kl_slope": 0, "stopped": 1}
    assert describe_flatness(flat, ["a"], window=3, max_slope=None) == {}
    moving: Records = [{"kl/a": 1.0 - 0.1 * t} for t in range(3)]
    (slope,) = describe_flatness(moving, ["a"], window=3, max_slope=0.33).values()
    assert slope == pytest.approx(1 / 3)  # and not stopped
    assert not is_stopped([])
    assert is_stopped([{}, found])
    assert not is_stopped([found, {}])


def test_a_window_of_two_steps_and_a_slope_of_zero_are_refused() -> None:
    for wrong in ({"window": 2}, {"max_slope": 0}):
        with pytest.raises(ValidationError):
            DistillConfig.model_validate({"early_stop": wrong})


@pytest.mark.parametrize("depth", [0, 1])
def test_a_flat_run_ends_early_and_killed_or_not_at_the_same_step(
    depth: int,
    make_job: Callable[[str], Job],
) -> None:
    asked = opd_stage(
        early_stop={"max_slope": 1e9, "window": 3},
        num_steps=9,
        max_staleness=depth,
        checkpoint_every=1,
        evaluate_every=2,
        evaluate_prompts=1,
    )
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    work_until(asked, broken, 3)
    work(asked, broken)
    assert_same_run(broken, straight)
    records = straight.metrics.records()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["stopped"] == 1
    assert "score/macro" in records[-1]
    assert all("stopped" not in record for record in records[:-1])


def test_a_run_killed_after_it_stopped_takes_no_further_step(
    make_job: Callable[[str], Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job("killed")
    how = {"max_slope": 1e9, "window": 3}
    asked = opd_stage(early_stop=how, num_steps=9, checkpoint_every=3, max_staleness=1)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distill.opd.save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            work(asked, job)
    before = without_time(job)
    work(asked, job)
    assert without_time(job) == before
    assert before[-1]["step"] == 3
    assert (job.out / "checkpoint").exists()
    assert not (job.out / "step.pt").exists()
