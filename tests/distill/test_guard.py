"""What counts as a spike, and what follows from several in a row."""

import math

import pytest

from distill.guard import MIN_NORMS, WINDOW, Guard


def judged(guard: Guard, norms: list[float]) -> list[str]:
    return [guard.judge(norm) for norm in norms]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad: float) -> None:
    guard = Guard()
    assert judged(guard, [bad, 1.0, bad, 1e30]) == ["skip", "update", "skip", "update"]
    assert guard.num_skipped == 2


def test_a_spike_by_hand() -> None:
    # median of 1..8 is 4.5, of 1..8 and 45 it is 5: limits 45 and 50
    guard = Guard(spike_factor=10)
    assert judged(guard, [float(n) for n in range(1, 9)]) == ["update"] * 8
    assert judged(guard, [45.1, 45.0, 50.1, 50.0]) == ["skip", "update", "skip", "update"]


def test_the_first_steps_are_no_spikes_however_large() -> None:
    guard = Guard(spike_factor=2)
    assert judged(guard, [10.0**n for n in range(MIN_NORMS)]) == ["update"] * MIN_NORMS


def test_a_skipped_norm_does_not_move_the_median() -> None:
    guard = Guard(spike_factor=2, max_skipped=100)
    judged(guard, [1.0] * MIN_NORMS)
    assert judged(guard, [3.0] * 20) == ["skip"] * 20


def test_norms_that_fall_by_and_by_leave_old_ones_behind() -> None:
    guard = Guard(spike_factor=3)
    judged(guard, [100.0] * WINDOW)
    judged(guard, [1.0] * WINDOW)
    assert guard.judge(4.0) == "skip"


def test_so_many_in_a_row_go_back_once_and_then_stop() -> None:
    guard = Guard(max_skipped=2)
    bad = math.nan
    found = judged(guard, [bad, 1.0, bad, bad, bad, 1.0, bad, bad])
    assert found == ["skip", "update", "skip", "roll_back", "skip", "update", "skip", "stop"]


def test_a_resumed_guard_decides_as_one_that_went_on() -> None:
    norms = [*[1.0] * MIN_NORMS, 9.0, 1.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0]
    straight = judged(Guard(spike_factor=5, max_skipped=2), norms)
    assert {"update", "skip", "roll_back", "stop"} <= set(straight)
    for cut in range(len(norms)):
        before, after = (Guard(spike_factor=5, max_skipped=2) for _ in range(2))
        first = judged(before, norms[:cut])
        after.load(before.state())
        assert first + judged(after, norms[cut:]) == straight
