"""The rollouts of the steps since the last step checkpoint, a file a step.

What was sampled is not sampled again after a kill. The pipeline needs that for its results too:
the weights that sampled the batches under way are gone when the learner is killed. Of a step that
is being sampled a journal keeps every token, until the step is kept whole.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from posttrain.files import write_atomic
from posttrain.rollout.types import Rollout


def write_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """All of them, or nothing."""
    write_atomic(path, "".join(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts))


def read_rollouts(path: Path) -> list[Rollout]:
    """Number for number."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Rollout(**json.loads(line)) for line in lines]


class KeptRollouts:
    """`folder/<step>.json`, or `<step>.journal` and the like; one process owns the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep a step's rollouts, all of them; its journals are done with."""
        write_rollouts(self._path(step), rollouts)
        for path in self._folder.glob(f"{self.journal(step).name}*"):
            path.unlink()

    def find(self, step: int) -> list[Rollout] | None:
        """A step's rollouts, number for number; None where they are not kept."""
        path = self._path(step)
        return read_rollouts(path) if path.exists() else None

    def journal(self, step: int) -> Path:
        """Where the journals of a step lie while it is sampled: this name, or it with a suffix."""
        return self._folder / f"{step}.journal"

    def newest(self) -> int:
        """The newest step of which something was sampled; -1: none."""
        return max((step for step, _ in self._files()), default=-1)

    def drop_before(self, step: int) -> None:
        """Forget the steps before this one: a step checkpoint holds what came of them."""
        for found, path in list(self._files()):
            if found < step:
                path.unlink()

    def _files(self) -> Iterator[tuple[int, Path]]:
        for path in self._folder.glob("[0-9]*.*"):
            yield int(path.name.partition(".")[0]), path

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.json"
