"""Which prompts GRPO visits: fresh ones, and again those that it neither always nor never solves.

A prompt teaches where its group's scores differ. What was measured is written down, a line a
group, so that a resumed run chooses as an undisturbed one does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from posttrain.domains import Row
from posttrain.files import write_atomic
from specialists.config import CurriculumConfig


class Curriculum:
    """Chooses the row of each visit from what earlier steps measured."""

    def __init__(self, path: Path, config: CurriculumConfig, *, seed: int) -> None:
        self._path = path
        self._config = config
        self._seed = seed
        self._has_spread: dict[tuple[int, str], bool] = {}
        """Of each prompt (task, row), when it was last measured."""
        self._is_begun = False

    def begin(self, step: int) -> None:
        """Called before every sampling: the first one of a process takes up what was measured
        before `step`, and forgets what a killed attempt measured since."""
        if self._is_begun:
            return
        self._is_begun = True
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))
        for found in map(json.loads, kept):
            self._has_spread[found["task"], found["id"]] = found["has_spread"]

    def choose(self, visit: int, task: int, planned: Row, rows: Sequence[Row]) -> Row:
        """The row of a visit: `planned`, or another of its domain's `rows`."""
        rng = Random(f"{self._seed}/{visit}/curriculum")
        known = [row for row in rows if self._has_spread.get((task, row.id))]
        if known and rng.random() >= self._config.fresh_share:
            return rng.choice(known)
        if (task, planned.id) not in self._has_spread:
            return planned
        fresh = [row for row in rows if (task, row.id) not in self._has_spread]
        return rng.choice(fresh or known or [planned])

    def teaching(self, task: int, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that may take the place of one whose group had no spread: all that are not known
        to have none, while there is one."""
        return [row for row in rows if self._has_spread.get((task, row.id), True)] or rows

    def record(self, step: int, task: int, row: Row, *, has_spread: bool) -> None:
        """What a group showed of its prompt."""
        line = {"step": step, "task": task, "id": row.id, "has_spread": has_spread}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._has_spread[task, row.id] = has_spread
