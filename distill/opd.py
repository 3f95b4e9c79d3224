"""On-policy distillation: the student answers, each domain's teacher reads along, the student
learns from the whole distribution at every token.

    prompts ──> student samples ──> teachers: last hidden states ──> reverse KL, one update
                     ^                                                      |
                     └──────────────── the student's new weights <──────────┘

A teacher's rows go to it as soon as the last of them is sampled, so that it works while the other
domains are still being sampled.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from distill.batch import Example, ScoredExample, example_from_rollout
from distill.config import DistillConfig, OpdStage
from distill.hiring import open_pool
from distill.ranks import hire_learners
from distill.resume import StepCheckpoint
from distill.roster import Rosters
from distill.schedule import Schedule, Visit
from distill.scores import heldout_requests, sampled_scores
from distill.teachers import Teachers
from posttrain.checkpoints import load_model, load_tokenizer, save_checkpoint
from posttrain.config import learning_rate_factor
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task


def work(stage: OpdStage, job: Job) -> None:
    """Distil the teachers into the student of `job.inputs[distill.start]`: checkpoint/.

    Goes on from the last step checkpoint, to the same bits. Raises TokenizerMismatch or
    CheckpointError where a teacher does not fit or is not the one that the run began with.
    """
    if (job.out / "checkpoint").exists():  # killed after its last save
        return
    torch.set_num_threads(job.num_threads)
    config = stage.distill
    start = job.inputs[config.start] / "checkpoint"
    model, tokenizer = load_model(start), load_tokenizer(start)
    teachers = open_pool(stage, model, tokenizer, job)
    rosters = Rosters(stage, job.out, hire=teachers.hire)
    learner = hire_learners(stage, job, start, model, teachers)
    engine = Engine(model, num_slots=config.num_slots, seed=job.seed)
    checkpoint = StepCheckpoint(job.out / "step.pt", learner)
    first = checkpoint.begin()
    job.metrics.rewind(first or -1)
    rosters.at(first)  # teachers that cannot teach are told before any work
    with open_tasks(stage, tokenizer, job) as tasks:
        schedule = make_schedule(tasks, config.prompts_per_step, job.seed)
        score = scorer(engine, tasks, config)
        tokens_seen = job.metrics.records()[-1]["tokens_seen"] if first else 0
        if not first and (scores := score(0)):
            job.metrics.log(0, config.num_steps, tokens_seen=0, **scores)
        for step in range(first, config.num_steps):
            now, version = rosters.at(step)
            engine.version = step
            visits = [visit for visit in schedule.visits(step) if visit.domain in now.teachers]
            requests = requests_of(visits, tasks, config.temperature)
            rollouts, rows = sample_and_score(engine, requests, now.mixtures, teachers)
            learner.weigh(now.shares)
            rate = learning_rate_factor(step, num_steps=config.num_steps, config=config.optimizer)
            learned = learner.step(rows, learning_rate_factor=rate) if rows else {}
            teachers.free(rows)
            checkpoint.heed_guard()
            tokens_seen += sum(len(row.example.positions) for row in rows)
            numbers = {name: float(value) for name, value in learned.items()}
            numbers |= describe(rollouts, num_skipped=len(rollouts) - len(rows))
            numbers |= {"tokens_seen": tokens_seen, "roster": version, **score(step + 1)}
            job.metrics.log(step + 1, config.num_steps, **numbers)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoint.save(step + 1)
    teachers.close()
    learner.close()
    save_checkpoint(model, tokenizer, job.out / "checkpoint")
    checkpoint.delete()


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
    engine: Engine, tasks: Mapping[str, Task], config: DistillConfig
) -> Callable[[int], dict[str, float]]:
    """Given how many steps are done, the student's scores where they are due, else nothing."""
    if not config.evaluate_every:
        return lambda _: {}
    requests = heldout_requests(
        tasks, num_prompts=config.evaluate_prompts, num_samples=config.evaluate_samples
    )

    def score(step: int) -> dict[str, float]:
        is_due = step % config.evaluate_every == 0 or step == config.num_steps
        return sampled_scores(engine, requests, tasks) if is_due else {}

    return score


def make_schedule(tasks: Mapping[str, Task], prompts_per_step: int, seed: int) -> Schedule:
    """Over the tasks' training rows. Raises DataError where a domain has none."""
    num_rows = {name: len(task.train) for name, task in tasks.items()}
    empty = sorted(name for name, count in num_rows.items() if count == 0)
    if empty:
        raise DataError(
            f"no prompts to distil on in {', '.join(empty)}: all are held out; give more rows or "
            "lower heldout_share"
        )
    return Schedule(num_rows, prompts_per_step, seed)


def requests_of(
    visits: Iterable[Visit], tasks: Mapping[str, Task], temperature: float
) -> list[Request]:
    """One request per visit; a prompt's earlier visits give it its sample number."""
    requests: list[Request] = []
    for (domain, epoch), group in groupby(visits, key=lambda visit: (visit.domain, visit.epoch)):
        task = tasks[domain]
        rows = [task.train[visit.row] for visit in group]
        requests += task.requests(rows, sample=epoch, temperature=temperature)
    return requests


def sample_and_score(
    engine: Engine,
    requests: Sequence[Request],
    mixtures: Mapping[str, Mapping[str, float]],
    teachers: Teachers,
) -> tuple[list[Rollout], list[ScoredExample]]:
    """All rollouts, and those with an own token as their teachers see them, in an order that does
    not depend on which finished first; `mixtures` gives each domain its weighted teachers."""
    names_of = {domain: " + ".join(sorted(mixture)) for domain, mixture in mixtures.items()}
    left = Counter(names_of[request.domain] for request in requests)
    rollouts: dict[str, list[Rollout]] = defaultdict(list)
    answers: dict[str, Callable[[], list[ScoredExample]]] = {}
    for rollout in engine.run(requests):
        names = names_of[rollout.domain]
        rollouts[names].append(replace(rollout, teacher=names))
        left[names] -= 1
        if left[names] == 0:
            rollouts[names].sort(key=lambda r: (r.domain, r.prompt_id, r.sample))
            coming = [mixtures[domain] for domain in sorted(mixtures) if left[names_of[domain]] > 0]
            then = min(coming[0]) if coming else None
            answers[names] = teachers.ask(examples_of(rollouts[names], mixtures), then=then)
    return (
        [rollout for names in sorted(rollouts) for rollout in rollouts[names]],
        [row for names in sorted(answers) for row in answers[names]()],
    )


def examples_of(
    rollouts: Iterable[Rollout], mixtures: Mapping[str, Mapping[str, float]]
) -> list[Example]:
    """What there is to learn; rollouts without an own token are left out."""
    examples = (example_from_rollout(r, teachers=mixtures[r.domain]) for r in rollouts)
    return [example for example in examples if example is not None]


def describe(rollouts: Sequence[Rollout], *, num_skipped: int) -> dict[str, float]:
    """`length/<domain>`: mean own tokens; `truncated/<domain>`: share cut at max_new_tokens;
    `skipped`: rollouts without an own token."""
    numbers: dict[str, float] = {"skipped": num_skipped}
    by_domain: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_domain[rollout.domain].append(rollout)
    for domain, group in by_domain.items():
        numbers[f"length/{domain}"] = sum(sum(r.is_own) for r in group) / len(group)
        is_cut = [r.finish_reason == "length" for r in group]
        numbers[f"truncated/{domain}"] = sum(is_cut) / len(group)
    return numbers
