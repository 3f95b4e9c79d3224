"""Answers that the teachers sampled, learned beside the student's own (GKD, arXiv 2306.13649, whose
lambda is 1 - share) and before them.

A domain's teachers answer some of its training prompts once, when the first of these answers is
asked for, each prompt by one of them, drawn by weight. The answers are kept until the run is over;
what a killed run had sampled goes on from its journal.

    <folder>/<hash>.jsonl           a domain's answers, under a hash of the domain and its teachers
    <folder>/<hash>.<n>.journal     the tokens of its n-th teacher, while it samples
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from distill.config import DistillConfig
from distill.hiring import load_teacher
from distill.kept_rollouts import read_rollouts, write_rollouts
from distill.schedule import Visit, row_order
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.rollout.worker import run_written
from posttrain.tasks import Task

Mixture = str | Mapping[str, float]
"""A domain's teacher, or several with their weights."""


class TeacherSamples:
    """The answers by domain and teachers; one process owns `folder`."""

    def __init__(
        self, folder: Path, tasks: Mapping[str, Task], config: DistillConfig, job: Job
    ) -> None:
        self._folder, self._tasks, self._config, self._job = folder, tasks, config, job
        self._kept: dict[str, list[Rollout]] = {}

    def num_answers(self) -> dict[str, int]:
        """How many each domain has."""
        most = self._config.teacher_samples.prompts_per_domain
        return {name: min(most, len(task.train)) for name, task in self._tasks.items()}

    def find(self, visits: Iterable[Visit], teachers: Mapping[str, Mixture]) -> list[Rollout]:
        """The answers that these visits learn, by the teachers that their domains have now. Samples
        those that are not kept."""
        return [self._answers(v.domain, teachers[v.domain])[v.row] for v in visits]

    def _answers(self, domain: str, mixture: Mixture) -> list[Rollout]:
        weights = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
        taught = json.dumps([domain, weights], sort_keys=True)
        key = hashlib.sha256(taught.encode()).hexdigest()[:16]
        if key not in self._kept:
            path = self._folder / f"{key}.jsonl"
            if not path.exists():
                write_rollouts(path, self._sample(domain, weights, path))
                for journal in self._folder.glob(f"{key}.*.journal"):
                    journal.unlink()
            self._kept[key] = read_rollouts(path)
        return self._kept[key]

    def _sample(self, domain: str, weights: Mapping[str, float], path: Path) -> list[Rollout]:
        """In the order of the prompts."""
        task, seed = self._tasks[domain], self._job.seed
        order = row_order(f"{domain}/teachers", len(task.train), 0, seed)
        rows = [task.train[row] for row in order[: self.num_answers()[domain]]]
        requests = task.requests(rows, temperature=self._config.temperature)
        names = sorted(weights)
        drawn = random.Random(f"{seed}/{domain}").choices(
            names, [weights[name] for name in names], k=len(requests)
        )
        found: dict[str, Rollout] = {}
        for number, name in enumerate(names):
            own = {r.prompt_id: r for r, who in zip(requests, drawn, strict=True) if who == name}
            journal = path.with_suffix(f".{number}.journal")
            for rollout in self._ask(name, list(own.values()), journal):
                found[rollout.prompt_id] = replace(rollout, sampled_by=name)
        return [found[request.prompt_id] for request in requests]

    def _ask(self, name: str, requests: Sequence[Request], journal: Path) -> Iterator[Rollout]:
        if not requests:
            return
        model = load_teacher(name, self._job)
        seed = random.Random(f"{self._job.seed}/{name}").getrandbits(32)  # the student has its own
        engine = Engine(model, num_slots=self._config.num_slots, seed=seed)
        yield from run_written(engine, requests, journal)
