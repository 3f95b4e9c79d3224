"""The step checkpoint: what a killed distillation goes on from, to the same bits.

Prompts, sampling and the learning rate are functions of the step; all the rest of a run's state is
here: the student, its optimizer, the guard's norms and torch's generator.
"""

import logging
from pathlib import Path

import torch

from distill.ranks import Learners
from posttrain.errors import StageError

log = logging.getLogger(__name__)


class StepCheckpoint:
    """The file `path`, replaced whole by each save."""

    def __init__(self, path: Path, learner: Learners) -> None:
        self._path, self._learner = path, learner

    def begin(self) -> int:
        """Restores what is there; the number of steps that are done. A new run's first weights are
        saved, since it may have to go back to them."""
        if not self._path.exists():
            self.save(0)
            return 0
        state = self._learner.load(self._path, with_guard=True)
        torch.set_rng_state(state["rng"])
        return state["step"]

    def save(self, step: int) -> bool:
        """The state after `step` steps; False, and nothing, after a skipped one, since weights that
        give a bad gradient are nothing to go back to."""
        if self._learner.guard.verdict == "skip":
            return False
        partial = self._path.with_name(self._path.name + ".tmp")
        state = {"step": step, "rng": torch.get_rng_state(), **self._learner.state()}
        torch.save(state, partial)
        partial.replace(self._path)
        return True

    def heed_guard(self) -> None:
        """After a step: go back where the guard says so, to go on with the next step's prompts. A
        resumed run comes to the same. Raises StageError where it has had enough."""
        verdict = self._learner.guard.verdict
        if verdict == "roll_back":
            step = self._learner.load(self._path, with_guard=False)["step"]
            self._learner.guard.verdict = "update"  # heeded: of weights that were good
            log.warning(
                "the student and its optimizer are again what they were after step %d", step
            )
        if verdict == "stop":
            raise StageError(
                "gradients are not finite or spikes step after step, and were so before the "
                "student went back to its last checkpoint: lower distill.optimizer.learning_rate, "
                "or raise distill.guard.spike_factor if they are no spikes; log.txt names each"
            )
