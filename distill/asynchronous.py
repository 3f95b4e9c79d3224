"""Batches made ahead of the learner, on a schedule that no clock decides.

The batch of step s is sampled with the weights of version max(s - depth, 0), where version v is the
weights after v steps. At depth 0 that is the learner's own version: the synchronous schedule. At
depth 1 what stands in one column here happens at the same time:

    learner              | learn 0 | learn 1 | learn 2 | ...
    sampler, teachers    | make 1  | make 2  | make 3  | ...     by versions 0, 1, 2

A deeper pipeline takes up what steps of different lengths leave idle. Which version samples what is
a function of the step alone, so that a run, killed and resumed or not, has the same bits however
long anything takes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Pipeline(Generic[T]):
    """A context in which steps' batches are made, in order, on a thread beside the learner's."""

    def __init__(
        self,
        plan: Callable[[int, int], Callable[[], T]],
        *,
        first: int,
        num_steps: int,
        depth: int,
    ) -> None:
        """`plan(step, version)` is called by the learner while it has the version that samples the
        step; the function that it returns makes the batch, elsewhere. Steps `first` ..
        `num_steps - 1` are made."""
        self._plan = plan
        self._depth = depth
        self._num_steps = num_steps
        self._next = first
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: dict[int, Callable[[], T]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def publish(self, version: int) -> None:
        """The learner has this version, one more than before: start what it samples."""
        while self._next <= version + self._depth and self._next < self._num_steps:
            make = self._plan(self._next, version)
            # the learner has nothing to do beside it at depth 0
            self._coming[self._next] = self._thread.submit(make).result if self._depth else make
            self._next += 1

    def take(self, step: int) -> T:
        """Wait for a step's batch; raises what its making raised."""
        return self._coming.pop(step)()

    def wait(self) -> None:
        """Until the batches that versions before the learner's sample are made: after that those
        versions are needed no more."""
        for result in list(self._coming.values())[: self._depth]:
            result()
