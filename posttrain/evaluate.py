"""Scores of a checkpoint on held-out prompts: k samples at T = 1 and one greedy answer to each.

    score = mean over prompts of the mean over k samples        (the headline)
    low, high = its 95% bootstrap interval over prompts         (posttrain.intervals)

Every checkpoint meets the same prompts under the same seeds, so that the scores per prompt, which
are kept, compare in pairs. The result does not depend on the order in which rollouts finish.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.domains import DomainSpec, Need, Row
from posttrain.errors import DataError
from posttrain.evaluate_config import EvaluateConfig, EvaluateStage
from posttrain.files import write_atomic
from posttrain.intervals import mean_interval
from posttrain.job import Job
from posttrain.judge import JudgeModel, stand_in
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task, heldout_rows
from rewards.score import Score, mean_reward


@dataclass(frozen=True)
class DomainScores:
    """A checkpoint on one domain; lists have one entry per prompt, in the split's order."""

    score: float
    """Mean over prompts of the mean score of their samples."""
    low: float
    high: float
    n: int
    """Held-out prompts that have a score: the independent trials behind the interval."""
    greedy: float | None
    """Mean score of the greedy answers; None where none were asked for."""
    per_prompt: list[float]
    greedy_per_prompt: list[float]
    prompt_ids: list[str]
    samples_per_prompt: int
    mean_length: float
    """Tokens that the model wrote in a sampled response; a tool's are not counted."""
    truncated: float
    """Share of the samples cut at max_new_tokens."""
    failures: dict[str, int]
    """Answers the reward could not judge, by kind; each scored 0. But `judge_unparsed`, answers
    that no vote of the judge could be read for, are left out of every mean; a prompt with no other
    has the mean of all prompts in the lists."""


@dataclass(frozen=True)
class Transcript:
    """The first sample of a prompt, with its score and the reward's reason."""

    domain: str
    prompt_id: str
    prompt: str
    answer: str
    """A line or more for each message, such as `assistant: 85`."""
    raw: str
    """The same as the model wrote it, control tokens and tool results included."""
    score: float | None
    """None where nobody could judge."""
    reason: str
    finish_reason: str


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on all domains, with a few transcripts of each."""

    domains: dict[str, DomainScores]
    transcripts: list[Transcript]

    @property
    def macro(self) -> float:
        """The mean of the domains' scores, every domain weighing the same."""
        return sum(scores.score for scores in self.domains.values()) / len(self.domains)

    def to_json(self) -> dict[str, Any]:
        """What scores.json holds."""
        return {"domains": {name: asdict(scores) for name, scores in self.domains.items()}}


def work(stage: EvaluateStage, job: Job) -> None:
    """Score the checkpoint of `job.inputs["checkpoint"]`: scores.json and samples.jsonl."""
    evaluation = evaluate_checkpoint(
        job.inputs["checkpoint"] / "checkpoint",
        stage.domains,
        stage.evaluate,
        recipe_folder=job.folder,
        data_seed=job.seed,
        metrics=job.metrics,
        judges={
            spec.name: stand_in(spec.judge, job.inputs, domain=spec.name) for spec in stage.domains
        },
    )
    lines = [json.dumps(asdict(t), ensure_ascii=False) for t in evaluation.transcripts]
    write_atomic(job.out / "samples.jsonl", "".join(line + "\n" for line in lines))
    write_atomic(job.out / "scores.json", json.dumps(evaluation.to_json(), indent=1))


def evaluate_checkpoint(
    folder: Path | str,
    domains: Sequence[DomainSpec],
    config: EvaluateConfig,
    *,
    recipe_folder: Path,
    data_seed: int = 0,
    metrics: Metrics | None = None,
    judges: Mapping[str, JudgeModel | Path | None] | None = None,
) -> Evaluation:
    """Score the checkpoint in `folder` on the held-out prompts of `domains`.

    The model goes to a GPU where there is one. `data_seed` is the seed the recipe's data were made
    with; `judges` has, by domain, those that lie in no folder of the recipe's.

    Raises DataError where a domain has no held-out prompt, or no verdict on its answers can be
    read, and CheckpointError where there is no checkpoint.
    """
    model: Any = load_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    need = Need(num_heldout=config.num_prompts) if config.num_prompts else None
    with ExitStack() as stack:
        tasks = {
            spec.name: stack.enter_context(
                closing(
                    Task(
                        spec,
                        tokenizer,
                        folder=recipe_folder,
                        seed=data_seed,
                        need=need,
                        judge=(judges or {}).get(spec.name),
                    )
                )
            )
            for spec in domains
        }
        rows = {name: heldout_rows(task, config.num_prompts) for name, task in tasks.items()}
        requests = [
            r for name, task in tasks.items() for r in requests_of(task, rows[name], config)
        ]
        engine = Engine(model, num_slots=config.num_slots, seed=config.seed)
        rollouts = with_progress(engine.run(requests), total=len(requests), metrics=metrics)
        by_domain: dict[str, list[Rollout]] = {name: [] for name in tasks}
        for rollout in rollouts:
            by_domain[rollout.domain].append(rollout)
        parts = [
            score_domain(tasks[name], rows[name], by_domain[name], tokenizer, config)
            for name in tasks
        ]
    return Evaluation(
        domains={name: scores for name, (scores, _) in zip(tasks, parts, strict=True)},
        transcripts=[t for _, transcripts in parts for t in transcripts],
    )


def requests_of(task: Task, rows: list[Row], config: EvaluateConfig) -> list[Request]:
    """Samples 0..k-1 of each row, and the greedy answer as sample k."""
    k = config.samples_per_prompt
    sampled = task.requests(rows, num_samples=k, temperature=config.temperature)
    greedy = task.requests(rows, sample=k, temperature=0.0) if config.greedy else []
    return [*sampled, *greedy]


def with_progress(
    rollouts: Iterable[Rollout], *, total: int, metrics: Metrics | None
) -> Iterable[Rollout]:
    """The rollouts, with about twenty lines of progress logged on their way."""
    every = max(1, total // 20)
    for done, rollout in enumerate(rollouts, start=1):
        if metrics is not None and (done % every == 0 or done == total):
            metrics.log(done, total)
        yield rollout


def score_domain(
    task: Task, rows: list[Row], rollouts: list[Rollout], tokenizer: Any, config: EvaluateConfig
) -> tuple[DomainScores, list[Transcript]]:
    """Grade one domain's rollouts, put into the order of rows and samples first."""
    k = config.samples_per_prompt
    place = {row.id: index for index, row in enumerate(rows)}
    rollouts = sorted(rollouts, key=lambda r: (place[r.prompt_id], r.sample))
    graded = list(zip(rollouts, task.score(rollouts), strict=True))
    sampled = [pair for pair in graded if pair[0].sample < k]
    greedy = known([score.reward for rollout, score in graded if rollout.sample == k], task)
    marks = [score for _, score in sampled]
    means = [mean_reward(marks[i : i + k]) for i in range(0, len(marks), k)]
    per_prompt, judged = known(means, task), [mean for mean in means if not math.isnan(mean)]
    interval = mean_interval(judged, num_resamples=config.num_resamples, seed=config.seed)
    scores = DomainScores(
        score=fmean(judged),
        low=interval.low,
        high=interval.high,
        n=len(judged),
        greedy=sum(greedy) / len(greedy) if greedy else None,
        per_prompt=per_prompt,
        greedy_per_prompt=greedy,
        prompt_ids=[row.id for row in rows],
        samples_per_prompt=k,
        mean_length=sum(sum(r.is_own) for r, _ in sampled) / len(sampled),
        truncated=sum(r.finish_reason == "length" for r, _ in sampled) / len(sampled),
        failures={**task.failures, **({"judge_unparsed": task.unjudged} if task.unjudged else {})},
    )
    shown = sampled[: config.num_transcripts * k : k]
    return scores, [transcript(task, rollout, score, tokenizer) for rollout, score in shown]


def known(values: list[float], task: Task) -> list[float]:
    """The values with the mean of the others in place of those that nobody could judge: so these
    move no mean, and each prompt keeps its place. Raises DataError where there are no others."""
    judged = [value for value in values if not math.isnan(value)]
    if values and not judged:
        raise DataError(
            f"domain {task.name!r}: no answer has a score, for of the {task.votes[0]} votes of its "
            f"judge {task.votes[1]} could not be read: give "
            "judge.checkpoint a model that ends as it is told to, or raise judge.max_new_tokens"
        )
    return [fmean(judged) if math.isnan(value) else value for value in values]


def transcript(task: Task, rollout: Rollout, score: Score, tokenizer: Any) -> Transcript:
    """One answer, told and verbatim."""
    whole = replace(rollout, finish_reason="stop")  # the field of that name says what was cut
    prompt = task.render(replace(whole, response=[], is_own=[], logp=[]))
    return Transcript(
        domain=rollout.domain,
        prompt_id=rollout.prompt_id,
        prompt=prompt.removeprefix("user: "),
        answer=task.render(whole).removeprefix(prompt).lstrip("\n"),
        raw=tokenizer.decode(rollout.response, clean_up_tokenization_spaces=False),
        score=None if math.isnan(score.reward) else score.reward,
        reason=score.reason,
        finish_reason=rollout.finish_reason,
    )
