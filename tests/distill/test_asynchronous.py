"""The pipeline's laws: who samples what, that it happens meanwhile, and what it waits for."""

import threading
import time
from collections.abc import Callable

import pytest

from distill.asynchronous import Pipeline

WAIT_S = 20


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_a_step_is_sampled_by_the_version_that_many_steps_before(depth: int, first: int) -> None:
    made: dict[int, int] = {}

    def plan(step: int, version: int) -> Callable[[], int]:
        def make() -> int:
            made[step] = version
            return step

        return make

    with Pipeline(plan, first=first, num_steps=9, depth=depth) as pipeline:
        pipeline.publish(first)
        for step in range(first, 9):
            assert pipeline.take(step) == step
            pipeline.publish(step + 1)
    # after a resume the batches of `first` and the next few are kept ones: no version samples them
    assert made == {step: max(step - depth, first) for step in range(first, 9)}


def test_the_next_batch_is_made_while_the_learner_learns() -> None:
    has_started, is_learned = threading.Event(), threading.Event()

    def plan(step: int, version: int) -> Callable[[], None]:
        def make() -> None:
            if step == 1:
                has_started.set()
                assert is_learned.wait(WAIT_S)  # in vain, were the learner to wait for it

        return make

    with Pipeline(plan, first=0, num_steps=2, depth=1) as pipeline:
        pipeline.publish(0)
        pipeline.take(0)
        assert has_started.wait(WAIT_S)
        is_learned.set()
        pipeline.publish(1)
        pipeline.take(1)


def test_nothing_is_made_before_it_is_taken_at_depth_0() -> None:
    made: list[int] = []

    def plan(step: int, version: int) -> Callable[[], None]:
        return lambda: made.append(step)

    with Pipeline(plan, first=0, num_steps=2, depth=0) as pipeline:
        pipeline.publish(0)
        assert made == []
        pipeline.take(0)
        pipeline.publish(1)
        pipeline.wait()
        assert made == [0]


def test_after_a_wait_no_earlier_version_is_needed() -> None:
    made: list[int] = []
    is_free = threading.Event()

    def plan(step: int, version: int) -> Callable[[], None]:
        def make() -> None:
            assert step < 4 or is_free.wait(WAIT_S)
            if step == 3:
                time.sleep(0.2)  # long enough for the learner to get ahead, were it not to wait
            made.append(step)

        return make

    with Pipeline(plan, first=0, num_steps=9, depth=2) as pipeline:
        pipeline.publish(0)
        for step in range(2):
            pipeline.take(step)
            pipeline.publish(step + 1)
        pipeline.wait()
        assert made == [0, 1, 2, 3]  # step 4 is version 2's, which the step checkpoint holds
        is_free.set()


def test_what_goes_wrong_is_raised_by_the_step_that_needs_it() -> None:
    def plan(step: int, version: int) -> Callable[[], int]:
        return lambda: 1 // (1 - step)

    with Pipeline(plan, first=0, num_steps=3, depth=1) as pipeline:
        pipeline.publish(0)
        assert pipeline.take(0) == 1
        with pytest.raises(ZeroDivisionError):
            pipeline.take(1)
