"""On-policy distillation: the student answers, each domain's teacher reads along, the student
learns from the whole distribution at every token.

    prompts ──> student samples ──> teachers: last hidden states ──> reverse KL, one update
                     ^                                                      |
                     └──────────────── the student's new weights <──────────┘
"""

import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from distill.allocation import GapDeal
from distill.asynchronous import Pipeline
from distill.config import DistillConfig, OpdStage
from distill.endings import Until, learned_until
from distill.flatness import describe_flatness, is_stopped
from distill.hiring import HASHES, open_pool
from distill.kept_rollouts import KeptRollouts
from distill.ranks import hire_learners
from distill.resume import StepCheckpoint
from distill.rollouts import Batch, describe, read_along, requests_of
from distill.roster import Rosters
from distill.samplers import make_sampler
from distill.schedule import EvenDeal, Schedule
from distill.scores import heldout_requests, sampled_scores
from distill.teacher_samples import TeacherSamples
from distill.teachers import Teachers
from posttrain.checkpoints import load_model, load_tokenizer, save_checkpoint
from posttrain.config import learning_rate_factor
from posttrain.errors import CheckpointError, DataError, InsufficientResources
from posttrain.job import Job
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
    with (
        open_tasks(stage, tokenizer, job) as tasks,
        make_pipeline(stage, job, model, tasks, teachers, rosters, kept, history) as pipeline,
    ):
        score = scorer(model, tasks, config, job.seed)
        tell = partial(describe, until=until_of(config), loop_window=config.endings.loop_window)
        flat = partial(describe_flatness, domains=list(tasks), **config.early_stop.model_dump())
        tokens_seen = history[-1]["tokens_seen"] if first else 0
        if not first and (scores := score(0)):
            job.metrics.log(0, config.num_steps, tokens_seen=0, **scores)
        pipeline.publish(first)
        for step in range(first, config.num_steps):
            if is_stopped(history):
                break
            batch, now, version = pipeline.take(step)
            rows = batch.rows()
            learner.weigh(now.shares)
            rate = learning_rate_factor(step, num_steps=config.num_steps, config=config.optimizer)
            learned = learner.step(rows, learning_rate_factor=rate) if rows else {}
            teachers.free(rows)
            checkpoint.heed_guard()
            tokens_seen += sum(len(row.example.positions) for row in rows)
            numbers = {name: float(value) for name, value in learned.items()}
            numbers |= tell(batch.rollouts, version=step, num_rows=len(rows))
            numbers |= {"tokens_seen": tokens_seen, "roster": version}
            history.append(numbers)
            numbers |= flat(history)
            is_last = is_stopped(history) or step + 1 == config.num_steps
            numbers |= score(step + 1, is_last=is_last)
            job.metrics.log(step + 1, config.num_steps, **numbers)
            if not is_last:
                pipeline.publish(step + 1)
            if (step + 1) % config.checkpoint_every == 0:
                pipeline.wait()
                if checkpoint.save(step + 1):
                    kept.drop_before(step + 1)
    teachers.close()
    learner.close()
    save_checkpoint(model, tokenizer, job.out / "checkpoint")
    clean(job.out)


def clean(out: Path) -> None:
    """The run is over: what it would have gone on from is not needed any more."""
    shutil.rmtree(out / "rollouts", ignore_errors=True)
    for name in ("step.pt", HASHES):
        (out / name).unlink(missing_ok=True)


def make_pipeline(
    stage: OpdStage,
    job: Job,
    model: Any,
    tasks: Mapping[str, Task],
    teachers: Teachers,
    rosters: Rosters,
    kept: KeptRollouts,
    history: Sequence[Mapping[str, Any]],
) -> Pipeline[tuple[Batch, OpdStage, int]]:
    """Makes the batches: samples what is not kept and lets the teachers read along; with each the
    stage as it was when the batch was planned, and its roster's version. `history` has the records
    of the steps that are learned, and grows."""
    config = stage.distill
    if config.max_staleness and config.teacher_dtype != "float32" and job.place is None:
        # transformers sets torch's default dtype, which threads share, while it loads a teacher
        raise InsufficientResources(
            f"distill.max_staleness is {config.max_staleness} and teacher_dtype is "
            f"{config.teacher_dtype}, which needs teachers in a process of their own: raise "
            "cluster.num_workers to 2, or set max_staleness to 0 or teacher_dtype to float32"
        )
    samples = TeacherSamples(job.out / "rollouts" / "teachers", tasks, config, job)
    schedule = make_schedule(tasks, config, job.seed, history, samples.num_answers())
    sampler = make_sampler(config, job, model, str(job.inputs[config.start] / "checkpoint"))

    def plan(step: int, version: int) -> Callable[[], tuple[Batch, OpdStage, int]]:
        now, roster = rosters.at(step)
        read = partial(
            read_along,
            mixtures=now.mixtures,
            teachers=teachers,
            step=step,
            is_warmup=step < config.teacher_samples.warmup_steps,
            until=until_of(config),
        )
        if (found := kept.find(step)) is not None:
            rollouts = [rollout for rollout in found if rollout.domain in now.teachers]
            return lambda: (read(rollouts, rollouts), now, roster)
        if version != max(step - config.max_staleness, 0):
            raise CheckpointError(
                f"the rollouts of step {step} are gone from {job.out}, and so are the weights "
                "that sampled them: delete that folder to distil anew"
            )
        visits = [visit for visit in schedule.visits(step) if visit.domain in now.teachers]
        taught = samples.find([v for v in visits if v.by_teacher], now.teachers)
        own = [visit for visit in visits if not visit.by_teacher]
        requests = requests_of(own, tasks, config.temperature)
        sample = sampler.at(version)

        def make() -> tuple[Batch, OpdStage, int]:
            rollouts = chain(taught, sample(requests, kept.journal(step)))
            batch = read(rollouts, [*taught, *requests])
            kept.put(step, batch.rollouts)
            return batch, now, roster

        return make

    first, depth = len(history), config.max_staleness
    return Pipeline(plan, first=first, num_steps=config.num_steps, depth=depth)


def until_of(config: DistillConfig) -> Until:
    """Which tokens of a rollout are learned from."""
    return partial(learned_until, **config.endings.model_dump())


@contextmanager
def open_tasks(stage: OpdStage, tokenizer: Any, job: Job) -> Generator[dict[str, Task]]:
    """The domains at work by name; their graders and tools end with the context."""
    with ExitStack() as stack:
        yield {
            spec.name: stack.enter_context(
                closing(Task(spec, tokenizer, folder=job.folder, seed=job.seed))
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


def make_schedule(
    tasks: Mapping[str, Task],
    config: DistillConfig,
    seed: int,
    history: Sequence[Mapping[str, Any]],
    num_answers: Mapping[str, int],
) -> Schedule:
    """Over the tasks' training rows and their teachers' answers. Raises DataError where a domain
    has no rows."""
    num_rows = {name: len(task.train) for name, task in tasks.items()}
    empty = sorted(name for name, count in num_rows.items() if count == 0)
    if empty:
        raise DataError(
            f"no prompts to distil on in {', '.join(empty)}: all are held out; give more rows or "
            "lower heldout_share"
        )
    domains, how = list(num_rows), config.allocation
    if how.by == "even":
        deal = EvenDeal(domains, config.prompts_per_step)
    else:
        bounds = how.model_dump(exclude={"by"})
        deal = GapDeal(
            domains, config.prompts_per_step, history, lag=config.max_staleness, **bounds
        )
    taught = config.teacher_samples
    return Schedule(num_rows, deal, seed, num_answers, taught.share, taught.warmup_steps)
