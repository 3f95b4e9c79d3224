"""What each domain's teachers score on the held-out prompts that the student is scored on: the same
prompts, sampled by the same seeds, so that a gap of 0 is a student who answers alike.

Found once a run, in the learner's process, with the teacher in memory beside the student, and kept
in teacher_scores.json.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from distill.config import OpdStage
from distill.hiring import teacher_folder
from distill.mesh import own_device
from distill.scores import heldout_requests, sampled_scores
from posttrain.checkpoints import load_model
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task


def teacher_scores(stage: OpdStage, tasks: Mapping[str, Task], job: Job) -> dict[str, float]:
    """By domain: the score of the teacher that the run begins with, or the weighted mean of
    several's. A KL to the base makes no teacher of it."""
    path = job.out / "teacher_scores.json"
    if not path.exists():
        write_atomic(path, json.dumps(_found(stage, tasks, job), indent=1))
    return json.loads(path.read_text("utf-8"))


def _found(stage: OpdStage, tasks: Mapping[str, Task], job: Job) -> dict[str, float]:
    weight: dict[str, dict[str, float]] = defaultdict(dict)
    for domain, given in stage.teachers.items():
        weights = {given: 1.0} if isinstance(given, str) else given
        for name, share in weights.items():
            weight[name][domain] = share / sum(weights.values())
    scores = dict.fromkeys(tasks, 0.0)
    for name, shares in sorted(weight.items()):
        own = {domain: tasks[domain] for domain in shares}
        for domain, score in _scored(name, own, stage, job).items():
            scores[domain] += shares[domain] * score
    return scores


def _scored(name: str, tasks: Mapping[str, Task], stage: OpdStage, job: Job) -> dict[str, float]:
    config = stage.distill
    with torch.random.fork_rng():  # a run that finds the scores draws what this one draws
        model: Any = load_model(teacher_folder(name, job))
    model.to(own_device())
    engine = Engine(model, num_slots=config.num_slots, seed=job.seed)
    asked = heldout_requests(
        tasks, num_prompts=config.evaluate_prompts, num_samples=config.evaluate_samples
    )
    found = sampled_scores(engine, asked, tasks)
    return {domain: found[f"score/{domain}"] for domain in tasks}
