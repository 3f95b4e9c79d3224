"""Who samples: the learner's own model between two steps, or workers with copies of its weights."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from distill.config import DistillConfig
from posttrain.job import Job, LocalRole
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.rollout.weights import Weights, copy_weights
from posttrain.rollout.worker import RolloutWorkers, run_written

Sample = Callable[[Sequence[Request], Path], Iterator[Rollout]]
"""The requests' rollouts, with a journal at the path, which a killed run goes on from."""


class Sampler(Protocol):
    """Samples with the weights that the learner had."""

    def at(self, version: int) -> Sample:
        """A function that samples with the learner's weights of this moment, whenever it is called;
        they are version `version`."""
        ...


class Colocated:
    """The learner's model itself: it must not learn while it samples."""

    def __init__(self, model: Any, *, num_slots: int, seed: int) -> None:
        self._engine = Engine(model, num_slots=num_slots, seed=seed)

    def at(self, version: int) -> Sample:
        def sample(requests: Sequence[Request], journal: Path) -> Iterator[Rollout]:
            self._engine.version = version
            return run_written(self._engine, requests, journal)

        return sample


class Separate:
    """Workers that get a copy of the weights whenever the version is another."""

    def __init__(self, model: Any, workers: RolloutWorkers) -> None:
        self._model = model
        self._workers = workers
        self._copied: tuple[int, Weights] | None = None
        self._loaded: int | None = None

    def at(self, version: int) -> Sample:
        if self._copied is None or self._copied[0] != version:
            self._copied = version, copy_weights(self._model)
        weights = self._copied[1]

        def sample(requests: Sequence[Request], journal: Path) -> Iterator[Rollout]:
            if self._loaded != version:
                self._workers.load(version, weights)
                self._loaded = version
            return self._workers.run(requests, journal)

        return sample


def make_sampler(config: DistillConfig, job: Job, model: Any, checkpoint: str) -> Sampler:
    """What a config asks for; workers live in the job's places, or beside the learner in its own
    process. `checkpoint` is one of the model's config."""
    options: dict[str, Any] = {"num_slots": config.num_slots, "seed": job.seed}
    if not config.num_rollout_workers and not config.num_steps_ahead:
        return Colocated(model, **options)
    path = "posttrain.rollout.worker:RolloutWorker"
    vllm = config.vllm_options if config.rollout_backend == "vllm" else None
    options |= {"checkpoint": checkpoint, "vllm": vllm}
    roles = [job.role(path, options) for _ in range(config.num_rollout_workers)]
    workers = RolloutWorkers(
        roles or [LocalRole(path, options)], timeout_s=config.rollout_timeout_s
    )
    return Separate(model, workers)
