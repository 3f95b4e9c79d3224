"""Supervised training on a specialist's own answers: the best of several to each train prompt.

    out/rollouts.journal    every token, before it is used: a killed stage goes on sampling there
    out/accepted.json       what is learned, once all was sampled and graded; part of the result

The tokens that were sampled are learned, never a text made of them; what tools said has no loss.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.domains import Need, overlap
from posttrain.errors import DataError
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.rollout.worker import run_written
from posttrain.tasks import Task
from specialists import training
from specialists.config import BestOfConfig, BestOfStage
from specialists.judge import open_task
from specialists.lora import load_start
from specialists.rows import TokenRow
from specialists.sft import learn, split_validation, task_score

ACCEPTED = "accepted.json"
JOURNAL = "rollouts.journal"

NUM_REPORTS = 20
"""How often the sampling says how far it is."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer and what it earned."""

    rollout: Rollout
    reward: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """Smaller is better: more reward, then fewer own tokens, then sampled earlier."""
        return -self.reward, sum(self.rollout.is_own), self.rollout.sample


def work(config: BestOfStage, job: Job) -> None:
    """Answer the domain's train prompts with `sampler`, and train `start` on the best answers.

    Raises:
        DataError: no answer is good enough.
    """
    if not training.prepare(job):
        return
    if not (job.out / ACCEPTED).exists():
        accepted = accept(config, job)
        write_atomic(job.out / ACCEPTED, json.dumps(accepted, ensure_ascii=False, indent=1))
    (job.out / JOURNAL).unlink(missing_ok=True)
    accepted = json.loads((job.out / ACCEPTED).read_text(encoding="utf-8"))
    rows = token_rows(accepted["answers"], learns_all=config.best_of.loss == "all")
    sources = {config.domain.name: rows}
    learned, kept = split_validation(sources, config.best_of.validation_share)
    start = job.inputs["start"] / training.RESULT
    model, base = load_start(start, config.best_of.lora)
    tokenizer = load_tokenizer(start)
    need = need_of(config.best_of)
    with task_score([config.domain], kept, tokenizer, config.best_of, job, need=need) as score:
        learn(
            model, tokenizer, learned, config=config.best_of, job=job,
            facts=accepted["counts"] | overlap.counts(job.out), validation=kept, score=score,
            base=base,
        )  # fmt: skip


def accept(config: BestOfStage, job: Job) -> dict[str, Any]:
    """The answers to learn, in the order of their prompts' ids, and counts of all there were."""
    folder, how = job.inputs["sampler"] / training.RESULT, config.best_of
    model: Any = load_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(model, num_slots=how.num_slots, seed=job.seed)
    spec = config.domain
    task = open_task(spec, load_tokenizer(folder), job, need=need_of(how), actor=model)
    answers: list[dict[str, Any]] = []
    rewards: list[float] = []
    num_prompts = num_cut = 0
    with closing(task):
        for group in graded_groups(engine, task, how, job):
            num_prompts += 1
            rewards += [graded.reward for graded in group]
            num_cut += sum(graded.rollout.finish_reason == "length" for graded in group)
            answers += [_record(task, graded) for graded in best(group, how)]
        failures, unjudged = sum(task.failures.values()), task.unjudged
    known = [reward for reward in rewards if not math.isnan(reward)]
    if not answers:
        raise DataError(
            f"domain {spec.name!r}: none of {len(rewards)} answers to {num_prompts} "
            f"prompts earned best_of.min_reward {how.min_reward:g} uncut (the most was "
            f"{max(known, default=0.0):g}, {num_cut} were cut): lower it, raise "
            "samples_per_prompt or max_new_tokens, or train the domain by sft or grpo first"
        )
    num_solved = len({answer["prompt_id"] for answer in answers})
    counts = {
        "prompts": num_prompts,
        "prompts_unsolved": num_prompts - num_solved,
        "answers": len(rewards),
        "answers_cut": num_cut,
        "answers_accepted": len(answers),
        "grader_failures": failures,
        **({"judge_unparsed": unjudged} if spec.judge else {}),
        "reward": fmean(known),
    }
    logger.info("best of %d answers to each prompt: %s", how.samples_per_prompt, counts)
    return {
        "counts": counts,
        "answers": sorted(answers, key=lambda a: (a["prompt_id"], a["sample"])),
    }


def need_of(config: BestOfConfig) -> Need | None:
    """The prompts that are answered; None: all."""
    return Need(num_train=config.num_prompts) if config.num_prompts else None


def graded_groups(
    engine: Engine, task: Task, config: BestOfConfig, job: Job
) -> Iterator[list[Graded]]:
    """Each prompt's answers soon after all of them are there, graded as many at a time as a judge's
    engine is worth; no others are held."""
    rows = sorted(task.train, key=lambda row: row.id)[: config.num_prompts]
    requests = task.requests(
        rows, num_samples=config.samples_per_prompt, temperature=config.temperature
    )
    waiting: dict[str, list[Rollout]] = {}
    full: list[Rollout] = []
    every, num_done = max(1, len(rows) // NUM_REPORTS), 0
    for rollout in run_written(engine, requests, job.out / JOURNAL):
        group = waiting.setdefault(rollout.prompt_id, [])
        group.append(rollout)
        if len(group) < config.samples_per_prompt:
            continue
        full += waiting.pop(rollout.prompt_id)
        if len(full) >= config.num_slots:
            yield from graded(task, full, config)
            full = []
        num_done += 1
        if num_done % every == 0:
            job.metrics.log(0, config.num_steps, prompts_answered=num_done)
    yield from graded(task, full, config)


def graded(task: Task, rollouts: Sequence[Rollout], config: BestOfConfig) -> list[list[Graded]]:
    """The groups of rollouts that come prompt after prompt."""
    pairs = zip(rollouts, task.score(rollouts), strict=True)
    marks = [Graded(rollout, score.reward) for rollout, score in pairs]
    size = config.samples_per_prompt
    return [marks[i : i + size] for i in range(0, len(marks), size)]


def best(group: Sequence[Graded], config: BestOfConfig) -> list[Graded]:
    """The different answers of a prompt that are learned, the best first."""
    good = [
        graded
        for graded in group
        if graded.reward >= config.min_reward and graded.rollout.finish_reason != "length"
    ]
    different: dict[tuple[int, ...], Graded] = {}
    for graded in sorted(good, key=lambda graded: graded.rank):
        different.setdefault(tuple(graded.rollout.response), graded)
    return list(different.values())[: config.keep_per_prompt]


def _record(task: Task, graded: Graded) -> dict[str, Any]:
    rollout = graded.rollout
    return {
        "prompt_id": rollout.prompt_id,
        "sample": rollout.sample,
        "reward": graded.reward,
        "text": task.render(rollout),
        "prompt": rollout.prompt,
        "response": rollout.response,
        "is_own": [int(own) for own in rollout.is_own],
    }


def token_rows(answers: Sequence[dict[str, Any]], *, learns_all: bool) -> list[TokenRow]:
    """As they are learned: the tokens that the sampler drew, and no others unless all are."""
    return [
        TokenRow(
            answer["prompt_id"],
            [*answer["prompt"], *answer["response"]],
            [
                learns_all or bool(own)
                for own in [*([0] * len(answer["prompt"])), *answer["is_own"]]
            ],
        )
        for answer in answers
    ]
