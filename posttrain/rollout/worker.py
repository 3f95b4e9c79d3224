"""Sampling away from the learner: an engine with weights of its own, in this process or others.

learner --- weights, by version ---> workers --- rollouts, as they finish ---> learner
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from posttrain.checkpoints import load_model
from posttrain.job import RoleHandle
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal, JournalError, fingerprint
from posttrain.rollout.types import Request, Rollout
from posttrain.rollout.vllm_engine import VllmEngine
from posttrain.rollout.weights import Weights, load_weights

log = logging.getLogger(__name__)

ROLLOUTS_PER_CALL = 8
"""Rollouts that travel together: the first are on their way while the others are sampled."""

LOCK_WAIT_S = 30.0
"""A killed run's worker, which has the journal open, may live on so long."""


def run_written(engine: Engine, requests: Sequence[Request], path: Path) -> Iterator[Rollout]:
    """The engine's rollouts, every token in the journal at `path` before it is used.

    What a killed run left there goes on. What other weights sampled, or is damaged, is sampled
    anew: a run that goes back to older weights may come to other ones under the same version.
    """
    with closing(Journal(path, wait_s=LOCK_WAIT_S)) as journal:
        try:
            weights = fingerprint(engine.model)
            journal.begin(seed=engine.seed, version=engine.version, weights=weights)
        except JournalError as error:
            log.warning("%s is sampled anew: %s", path, error)
            journal.clear()
        engine.journal = journal
        try:
            yield from engine.run(requests)
        finally:
            engine.journal = None


class RolloutWorker:
    """One engine, and the weights that it samples with: a plain class, wherever it lives."""

    def __init__(
        self,
        checkpoint: str,
        *,
        num_slots: int,
        seed: int,
        device: str | None = None,
        vllm: Mapping[str, Any] | None = None,
    ) -> None:
        """`checkpoint` gives the architecture; its weights are those before the first `load`. The
        device is a GPU where there is one. `vllm`: sample with vLLM, and these options of it; the
        GPU is then vLLM's."""
        self._rollouts: Iterator[Rollout] = iter(())
        model: Any = load_model(checkpoint)
        if vllm is not None:
            self._engine: Engine = VllmEngine(model, num_slots=num_slots, seed=seed, options=vllm)
            return
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._engine = Engine(model, num_slots=num_slots, seed=seed)

    def load(self, version: int, weights: Weights) -> None:
        """Sample with these weights from now on, under this version."""
        load_weights(self._engine.model, weights)
        self._engine.version = version

    def start(self, requests: Sequence[Request], journal: Path | None = None) -> None:
        """Take up these requests in the place of all earlier ones; as `run_written` where there is
        a journal."""
        if journal is None:
            self._rollouts = self._engine.run(requests)
        else:
            self._rollouts = run_written(self._engine, requests, journal)

    def take(self) -> list[Rollout]:
        """The next few rollouts to finish; none when all have."""
        return list(islice(self._rollouts, ROLLOUTS_PER_CALL))


class RolloutWorkers:
    """The learner's side of one worker or several, which share every batch of requests."""

    def __init__(self, workers: Sequence[RoleHandle], *, timeout_s: float) -> None:
        """`timeout_s` bounds the wait for a few rollouts, not for all."""
        self._workers = list(workers)
        self._timeout_s = timeout_s

    def load(self, version: int, weights: Weights) -> None:
        """Sample with these weights from now on."""
        for loaded in [worker.call("load", version, weights) for worker in self._workers]:
            loaded.result(self._timeout_s)

    def run(self, requests: Sequence[Request], journal: Path | None = None) -> Iterator[Rollout]:
        """Rollouts as they finish, in any order. Requests are dealt like cards: tokens do not
        depend on who samples them, and so every worker gets as much of each domain. Worker i keeps
        a journal at `journal`.i."""
        num_workers = len(self._workers)
        for i, worker in enumerate(self._workers):
            own = journal and journal.with_name(f"{journal.name}.{i}")
            worker.call("start", list(requests[i::num_workers]), own).result(self._timeout_s)
        coming = [(worker, worker.call("take")) for worker in self._workers]
        while coming:
            worker, future = coming.pop(0)
            if rollouts := future.result(self._timeout_s):
                coming.append((worker, worker.call("take")))
                yield from rollouts
