"""On-policy distillation: the student answers, each domain's teacher reads along, the student
learns from the whole distribution at every token.

    prompts ──> student samples ──> teachers: last hidden states ──> reverse KL, one update
                     ^                                                      |
                     └──────────────── the student's new weights <──────────┘
"""

import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.asynchronous import Pipeline
from distill.batches import Batches, learned_of, until_of
from distill.config import DistillConfig, OpdStage
from distill.flatness import describe_flatness, is_stopped
from distill.hiring import HASHES, open_pool
from distill.kept_rollouts import KeptRollouts
from distill.ranks import hire_learners
from distill.resume import StepCheckpoint
from distill.rollouts import describe
from distill.roster import Rosters
from distill.scores import heldout_requests, sampled_scores
from posttrain.checkpoints import load_model, load_tokenizer, save_checkpoint
from posttrain.config import learning_rate_factor
from posttrain.domains import Need
from posttrain.job import Job
from posttrain.judge import stand_in
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task


def work(stage: OpdStage, job: Job) -> None:
    """Distil the teachers into the student of `job.inputs[distill.start]`: checkpoint/.

    Goes on from the last step checkpoint, to the same bits. Raises TokenizerMismatch or
    CheckpointError where a teacher does not fit or is not the one that the run began with.
    """
    if (job.out / "checkpoint").exists():  # killed after its last save
        clean(job.out)
        return
    torch.set_num_threads(job.num_threads)
    config = stage.distill
    start = job.inputs[config.start] / "checkpoint"
    model, tokenizer = load_model(start), load_tokenizer(start)
    kept = KeptRollouts(job.out / "rollouts")
    teachers = open_pool(stage, model, tokenizer, job)
    rosters = Rosters(stage, job.out, hire=teachers.hire, begun=kept.newest())
    learner = hire_learners(stage, job, start, model, teachers)
    checkpoint = StepCheckpoint(job.out / "step.pt", learner)
    first = checkpoint.begin()
    job.metrics.rewind(first or -1)
    rosters.at(first)  # teachers that cannot teach are told before any work
    history = [record for record in job.metrics.records() if record["step"] > 0]
    end, depth = config.num_steps, config.num_steps_ahead
    with ExitStack() as stack:
        tasks = stack.enter_context(open_tasks(stage, tokenizer, job))
        batches = Batches(stage, job, model, tasks, teachers, rosters, kept, history)
        pipeline = Pipeline(batches.plan, first=first, num_steps=end, depth=depth)
        stack.enter_context(pipeline)
        score = scorer(model, tasks, config, job.seed)
        tell = partial(describe, until=until_of(config), loop_window=config.endings.loop_window)
        flat = partial(describe_flatness, domains=list(tasks), **config.early_stop.model_dump())
        tokens_seen = history[-1]["tokens_seen"] if first else 0
        if not first and (scores := score(0)):
            job.metrics.log(0, end, tokens_seen=0, **scores)
        pipeline.publish(first)
        for step in range(first, end):
            if is_stopped(history):
                break
            made = pipeline.take(step)
            rows = made.batch.rows()
            learner.weigh(made.stage.shares)
            rate = learning_rate_factor(step, num_steps=end, config=config.optimizer)
            learned = learner.step(rows, learning_rate_factor=rate) if rows else {}
            teachers.free(rows)
            checkpoint.heed_guard()
            tokens_seen += sum(len(row.example.positions) for row in rows)
            numbers = {name: float(value) for name, value in learned.items()}
            learns = learned_of(config, step)
            numbers |= tell(made.batch, version=step, num_rows=len(rows), learned=learns)
            numbers |= {"tokens_seen": tokens_seen, "roster": made.roster}
            history.append(numbers)
            numbers |= flat(history)
            is_last = is_stopped(history) or step + 1 == end
            numbers |= score(step + 1, is_last=is_last)
            job.metrics.log(step + 1, end, **numbers)
            if not is_last:
                pipeline.publish(step + 1)
            if (step + 1) % config.checkpoint_every == 0:
                pipeline.wait()
                if checkpoint.save(step + 1):
                    kept.drop_before(step)  # what has paused goes on from here
    teachers.close()
    learner.close()
    save_checkpoint(model, tokenizer, job.out / "checkpoint")
    clean(job.out)


def clean(out: Path) -> None:
    """The run is over: what it would have gone on from is not needed any more."""
    shutil.rmtree(out / "rollouts", ignore_errors=True)
    for name in ("step.pt", HASHES):
        (out / name).unlink(missing_ok=True)


@contextmanager
def open_tasks(stage: OpdStage, tokenizer: Any, job: Job) -> Generator[dict[str, Task]]:
    """The domains at work by name; their graders and tools end with the context."""
    how = stage.distill
    num_heldout = how.evaluate_prompts if how.evaluate_every else 0
    need = Need(num_train=how.num_steps * how.prompts_per_step, num_heldout=num_heldout)
    with ExitStack() as stack:
        yield {
            spec.name: stack.enter_context(
                closing(
                    Task(
                        spec,
                        tokenizer,
                        folder=job.folder,
                        seed=job.seed,
                        need=need,
                        judge=stand_in(spec.judge, job.inputs, domain=spec.name),
                        out=job.out,
                    )
                )
            )
            for spec in stage.domains
        }


def scorer(
    model: Any, tasks: Mapping[str, Task], config: DistillConfig, seed: int
) -> Callable[..., dict[str, float]]:
    """Given how many steps are done, and whether they are all, the student's scores where they are
    due, else nothing."""
    if not config.evaluate_every:
        return lambda _, is_last=False: {}
    requests = heldout_requests(
        tasks, num_prompts=config.evaluate_prompts, num_samples=config.evaluate_samples
    )

    engine = Engine(model, num_slots=config.num_slots, seed=seed)

    def score(step: int, *, is_last: bool = False) -> dict[str, float]:
        is_due = is_last or step % config.evaluate_every == 0
        return sampled_scores(engine, requests, tasks) if is_due else {}

    return score
