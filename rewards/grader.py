"""Grading in a process of its own: a reward that raises, hangs, exits or returns nonsense is a zero
with a reason, and the next answer is graded as if nothing had happened.

    with Grader({"mathematics": 1.0, "brief:reward": 0.2}, folder=recipe_folder) as grader:
        scores = grader.score([GradeItem("the answer is 85.", {"answer": "85"})])
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rewards.failures import Failures
from rewards.process import START_TIMEOUT_S, WorkerDied, WorkerProcess
from rewards.registry import known_reward
from rewards.score import RewardError, Score, shown
from rewards.wire import Setup

LOGGER = logging.getLogger(__name__)

BATCH_SIZE = 256
"""Items in one message: what has to be sent again when one of them kills the process."""

MEMORY_GB = 4.0
"""The grading process's address space, by default."""


@dataclass(frozen=True, slots=True)
class GradeItem:
    """`GradeItem("the answer is 85.", {"answer": "85", "messages": [...]})`."""

    response: str
    """The content of the last assistant turn."""
    row: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the reward gets besides: `answer`, `messages` and the row's further fields."""


class Grader:
    """Weighs rewards (a name or `module:function` to its weight) and sums them for each item.

    RewardError, before anything is graded, where one is unknown or its module cannot be imported.
    `timeout_s` is for one item; `memory_gb` bounds the process's address space. Threads may share
    a grader: they take turns.
    """

    def __init__(
        self,
        rewards: Mapping[str, float],
        *,
        folder: Path | None = None,
        timeout_s: float = 5.0,
        memory_gb: float = MEMORY_GB,
    ) -> None:
        if not rewards:
            raise RewardError("a grader needs at least one reward, but got none")
        for name, weight in rewards.items():
            known_reward(name, folder)
            if not math.isfinite(weight):
                raise RewardError(f"reward {name!r} has weight {weight}: give it a finite number")
        self._rewards = dict(rewards)
        self._folder = None if folder is None else folder.resolve()
        self._timeout_s = timeout_s
        self._memory_gb = memory_gb
        self._lock = threading.Lock()
        self.failures = Failures()
        """How many items failed to be graded, by kind: raised, timeout, died, not_finite,
        wrong_type, bad_gold."""
        self.facts: dict[str, str] = {}
        """What the rewards said of their surroundings: the level of the `sandbox` that programs
        run in, once one has."""
        self._worker: WorkerProcess | None = self._start()

    def score(self, items: Sequence[GradeItem]) -> list[Score]:
        """One score for each item, in their order."""
        scores: list[Score] = []
        with self._lock:
            while len(scores) < len(items):
                scores += self._graded(items[len(scores) : len(scores) + BATCH_SIZE])
        return scores

    def close(self) -> None:
        """End the grading process; a later `score` would start another. Logs how many failed."""
        with self._lock:
            self._stop()
        names = " + ".join(self._rewards)
        self.failures.log_counts(f"reward {names}: answers that scored 0", LOGGER)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _graded(self, batch: Sequence[GradeItem]) -> list[Score]:
        """The scores of the batch's first items: all, or as far as the process lived. At least one,
        so that an item which kills the process is not sent again."""
        scores: list[Score] = []
        worker = self._living()
        timeout_s = START_TIMEOUT_S
        try:
            worker.send([_packed(item) for item in batch])
            self._note(worker.receive(timeout_s)["facts"])
            timeout_s = self._timeout_s
            while len(scores) < len(batch):
                reply = worker.receive(timeout_s)
                if reply["failure"]:
                    self._count(reply["failure"], reply["reason"], batch[len(scores)])
                scores.append(Score(reply["reward"], reply["reason"], reply["terms"]))
        except TimeoutError:
            reason = f"no score after {timeout_s:g} s"
            scores.append(self._lost("timeout", reason, batch[len(scores)]))
        except WorkerDied as error:
            scores.append(self._lost("died", str(error), batch[len(scores)]))
        except BaseException:  # Ctrl-C, say: replies to this batch must not meet the next one
            self._stop()
            raise
        return scores

    def _note(self, facts: Mapping[str, str]) -> None:
        for name, value in facts.items():
            if self.facts.get(name) != value:
                LOGGER.info("reward %s: %s: %s", " + ".join(self._rewards), name, value)
        self.facts.update(facts)

    def _lost(self, kind: str, reason: str, item: GradeItem) -> Score:
        self._stop()
        self._count(kind, reason, item)
        return Score(0.0, reason)

    def _count(self, kind: str, reason: str, item: GradeItem) -> None:
        names = " + ".join(self._rewards)
        message = f"reward {names}: {shown(item.response)} scores 0 ({kind}): {reason}"
        self.failures.add(kind, message, LOGGER)

    def _living(self) -> WorkerProcess:
        if self._worker is None or not self._worker.is_alive():
            self._stop()
            self._worker = self._start()
        return self._worker

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._folder)
        try:
            worker.send(self._setup())
            problem = worker.receive(START_TIMEOUT_S).get("error")
        except TimeoutError:
            problem = f"was not ready after {START_TIMEOUT_S:g} s: make its imports faster"
        except WorkerDied as error:
            problem = f"did not live to load its rewards: {error}; import their modules by hand"
        except BaseException:
            worker.close()
            raise
        if problem is not None:
            worker.close()
            raise RewardError(f"the grader of {', '.join(self._rewards)}: {problem}")
        return worker

    def _setup(self) -> Setup:
        return Setup(
            self._rewards,
            self._folder,
            timeout_s=self._timeout_s,
            memory_gb=self._memory_gb,
            parent=os.getpid(),
            is_main_thread=threading.current_thread() is threading.main_thread(),
        )

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def check_loads(rewards: Collection[str], folder: Path, *, timeout_s: float) -> None:
    """RewardError if one of the rewards cannot be loaded, in a grading process as theirs will be.

    Nothing is said of a module whose import takes longer than `timeout_s`: the grader waits for it.
    """
    worker = WorkerProcess(folder.resolve())
    try:
        worker.send(
            Setup(
                dict.fromkeys(rewards, 1.0),
                folder.resolve(),
                timeout_s=timeout_s,
                memory_gb=MEMORY_GB,
                parent=os.getpid(),
                is_main_thread=threading.current_thread() is threading.main_thread(),
            )
        )
        problem = worker.receive(timeout_s).get("error")
    except TimeoutError:
        return
    except WorkerDied as error:
        problem = f"importing {', '.join(rewards)}: {error}; import their modules by hand"
    finally:
        worker.close()
    if problem is not None:
        raise RewardError(problem)


def _packed(item: GradeItem) -> bytes:
    """The item, or in its place why it cannot be sent."""
    try:
        return pickle.dumps((item.response, item.row), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 - a row holds what a user's data function yields
        return pickle.dumps(f"the row cannot be sent to the grading process: {error}")
