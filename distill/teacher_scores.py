"""What each domain's teachers score on the held-out prompts that the student is scored on: the same
prompts, sampled by the same seeds, so that a gap of 0 is a student who answers alike.

Found once a run, in the learner's process, with the teacher in memory beside the student, and kept
in teacher_scores.json.
"""

import json
from collections.abc import Mapping

from distill.config import OpdStage
from distill.hiring import load_teacher
from distill.scores import heldout_requests, sampled_scores
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
    taught, scores = stage.taught, dict.fromkeys(tasks, 0.0)
    for name in sorted({name for weights in taught.values() for name in weights}):
        own = {domain: task for domain, task in tasks.items() if name in taught[domain]}
        for domain, score in _scored(name, own, stage, job).items():
            scores[domain] += taught[domain][name] * score
    return scores


def _scored(name: str, tasks: Mapping[str, Task], stage: OpdStage, job: Job) -> dict[str, float]:
    config = stage.distill
    engine = Engine(load_teacher(name, job), num_slots=config.num_slots, seed=job.seed)
    asked = heldout_requests(
        tasks, num_prompts=config.evaluate_prompts, num_samples=config.evaluate_samples
    )
    found = sampled_scores(engine, asked, tasks)
    return {domain: found[f"score/{domain}"] for domain in tasks}
