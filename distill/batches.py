"""Each step's batch: planned on the learner's thread, made on the pipeline's.

plan    roster, schedule, teachers' answers ──> requests, and the weights that sample them
make    requests ──> rollouts ──> the teachers' last hidden states
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from distill.allocation import GapDeal, kl_gaps, score_gaps
from distill.config import DistillConfig, OpdStage
from distill.endings import Until, learned_until
from distill.kept_rollouts import KeptRollouts
from distill.rollouts import Batch, read_along, requests_of
from distill.roster import Rosters
from distill.samplers import make_sampler
from distill.schedule import Deal, EvenDeal, Schedule
from distill.staleness import Learned, fresh_from
from distill.teacher_samples import TeacherSamples
from distill.teacher_scores import teacher_scores
from distill.teachers import Teachers
from posttrain.errors import CheckpointError, DataError, InsufficientResources
from posttrain.job import Job
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task

History = Sequence[Mapping[str, Any]]
"""The records of the steps that are learned; it grows."""


@dataclass(frozen=True)
class StepBatch:
    """What a step learns from, and by what it was planned."""

    batch: Batch
    stage: OpdStage
    """As the step's roster has it."""

    roster: int
    """The roster's version."""


class Batches:
    """Plans what is sampled for each step, unless it is kept, and lets the teachers read along."""

    def __init__(
        self,
        stage: OpdStage,
        job: Job,
        model: Any,
        tasks: Mapping[str, Task],
        teachers: Teachers,
        rosters: Rosters,
        kept: KeptRollouts,
        history: History,
    ) -> None:
        """Raises InsufficientResources or DataError where there can be no batch."""
        config = stage.distill
        check_threads(config, job)
        self._config, self._out, self._tasks = config, job.out, tasks
        self._teachers, self._rosters, self._kept = teachers, rosters, kept
        self._answers = TeacherSamples(job.out / "rollouts" / "teachers", tasks, config, job)
        num_answers = self._answers.num_answers()
        deal = make_deal(stage, tasks, job, history)
        taught = config.teacher_samples
        num_rows = {name: len(task.train) for name, task in tasks.items()}
        self._schedule = Schedule(
            num_rows, deal, job.seed, num_answers, taught.share, taught.warmup_steps
        )
        start = str(job.inputs[config.start] / "checkpoint")
        self._sampler = make_sampler(config, job, model, start)

    def plan(self, step: int, version: int) -> Callable[[], StepBatch]:
        """While the learner has this version: how the step's batch is made, wherever that is."""
        now, roster = self._rosters.at(step)
        read = partial(self._read, step, now)
        if (found := self._kept.find(step)) is not None:
            rollouts = [rollout for rollout in found if rollout.domain in now.teachers]
            return lambda: StepBatch(read(rollouts, rollouts), now, roster)
        if version != max(step - self._config.num_steps_ahead, 0):
            raise self._gone(step)
        taught, fresh = self._ask(step, now)
        sample = self._sampler.at(version)

        def make() -> StepBatch:
            requests = [*self._paused(step, now), *fresh]
            rollouts = chain(taught, sample(requests, self._kept.journal(step)))
            batch = read(rollouts, [*taught, *requests])
            self._kept.put(step, [*batch.rollouts, *batch.paused])
            return StepBatch(batch, now, roster)

        return make

    def _ask(self, step: int, now: OpdStage) -> tuple[list[Rollout], list[Request]]:
        """The teachers' answers that a step learns, and what the student is asked."""
        visits = [visit for visit in self._schedule.visits(step) if visit.domain in now.teachers]
        taught = self._answers.find([v for v in visits if v.by_teacher], now.teachers)
        own = [visit for visit in visits if not visit.by_teacher]
        asked = requests_of(own, self._tasks, self._config.temperature)
        return taught, [replace(request, pause_at=self._part(step)) for request in asked]

    def _paused(self, step: int, now: OpdStage) -> list[Request]:
        """What goes on of the step before."""
        if self._config.partial_rollout_tokens is None or step == 0:
            return []
        before = self._kept.find(step - 1)
        if before is None:
            raise self._gone(step - 1)
        temperature, part = self._config.temperature, self._part(step)
        return [
            replace(
                self._tasks[rollout.domain].request_of(rollout, temperature=temperature),
                begun=rollout,
                pause_at=part and len(rollout.response) + part,
            )
            for rollout in before
            if rollout.finish_reason == "paused" and rollout.domain in now.teachers
        ]

    def _part(self, step: int) -> int:
        """Tokens of a rollout in a step; 0: all."""
        is_last = step + 1 == self._config.num_steps
        return 0 if is_last else self._config.partial_rollout_tokens or 0

    def _gone(self, step: int) -> CheckpointError:
        return CheckpointError(
            f"the rollouts of step {step} are gone from {self._out}, and so are the weights "
            "that sampled them: delete that folder to distil anew"
        )

    def _read(
        self,
        step: int,
        now: OpdStage,
        rollouts: Iterable[Rollout],
        requests: Iterable[Request | Rollout],
    ) -> Batch:
        return read_along(
            rollouts,
            requests,
            now.mixtures,
            self._teachers,
            step=step,
            is_warmup=step < self._config.teacher_samples.warmup_steps,
            learned=learned_of(self._config, step),
        )


def until_of(config: DistillConfig) -> Until:
    """Which tokens of a rollout are learned from."""
    return partial(learned_until, **config.endings.model_dump())


def learned_of(config: DistillConfig, step: int) -> Learned:
    """What is not too old in this step, nor left out for how the rollout ends."""
    until, oldest = until_of(config), step - config.max_staleness
    return lambda rollout: slice(fresh_from(rollout, oldest), until(rollout))


def check_threads(config: DistillConfig, job: Job) -> None:
    """Raise InsufficientResources where teachers would be loaded beside the learner in one process:
    transformers sets torch's default dtype meanwhile, which threads share."""
    if config.num_steps_ahead and config.teacher_dtype != "float32" and job.place is None:
        raise InsufficientResources(
            f"distill.max_staleness is {config.max_staleness} and teacher_dtype is "
            f"{config.teacher_dtype}, which needs teachers in a process of their own: raise "
            "cluster.num_workers to 2, or set max_staleness to 0 or teacher_dtype to float32"
        )


def make_deal(stage: OpdStage, tasks: Mapping[str, Task], job: Job, history: History) -> Deal:
    """How prompts are shared out. Raises DataError where a domain has none."""
    empty = sorted(name for name, task in tasks.items() if not task.train)
    if empty:
        raise DataError(
            f"no prompts to distil on in {', '.join(empty)}: all are held out; give more rows or "
            "lower heldout_share"
        )
    config, domains = stage.distill, list(tasks)
    how, num_prompts = config.allocation, config.prompts_per_step
    if how.by == "even":
        return EvenDeal(domains, num_prompts)
    if how.by == "kl":
        gaps = partial(kl_gaps, domains=domains)
    else:
        gaps = partial(score_gaps, targets=teacher_scores(stage, tasks, job))
    bounds = how.model_dump(exclude={"by"})
    lag = config.num_steps_ahead
    return GapDeal(domains, num_prompts, history, gaps=gaps, lag=lag, **bounds)
