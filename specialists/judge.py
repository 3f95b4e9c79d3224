"""Who judges while a specialist is made; how a judge judges is posttrain/judge.py."""

from typing import Any

from posttrain.domains import DomainSpec, Need
from posttrain.job import Job
from posttrain.judge import JudgeModel, stand_in
from posttrain.tasks import Task
from specialists.lora import engine_for


def open_task(
    spec: DomainSpec, tokenizer: Any, job: Job, *, need: Need | None = None, actor: Any = None
) -> Task:
    """The domain at work. Where its judge is the actor, the model `actor` judges with the weights
    that it has at each scoring; without one the base does, so that scores compare."""
    model = actor and JudgeModel(actor, tokenizer, engine_for)
    judge = stand_in(spec.judge, job.inputs, domain=spec.name, actor=model)
    return Task(
        spec, tokenizer, folder=job.folder, seed=job.seed, need=need, judge=judge, out=job.out
    )
