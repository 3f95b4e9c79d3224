"""The rollouts of the steps since the last step checkpoint, a file a step.

What was sampled is not sampled again after a kill. The pipeline needs that for its results too:
the weights that sampled the batches under way are gone when the learner is killed.
"""

import json
import shutil
from collections.abc import Sequence
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
    """`folder/<step>.json`; one process owns the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keep a step's rollouts, all of them."""
        write_rollouts(self._path(step), rollouts)

    def find(self, step: int) -> list[Rollout] | None:
        """A step's rollouts, number for number; None where they are not kept."""
        path = self._path(step)
        return read_rollouts(path) if path.exists() else None

    def drop_before(self, step: int) -> None:
        """Forget the steps before this one: a step checkpoint holds what came of them."""
        for path in self._folder.glob("*.json"):
            if int(path.stem) < step:
                path.unlink()

    def close(self) -> None:
        """Forget all: the run is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.json"
