"""Groups of answers for GRPO: TRL's `rollout_func`, its rewards, and what a step logs.

The data set that TRL sees holds the numbers of visits ("0", "1", ...), in the order in which the
prompts are to be visited; a visit's group is sampled, scored and handed back as token ids.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean, pstdev
from typing import Any

from posttrain.domains import Row
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task
from rewards.score import Score, mean_reward
from specialists.choices import fields_of
from specialists.config import GrpoConfig
from specialists.curriculum import Curriculum
from specialists.effort import length_penalty

FIELD = "score"
"""The extra field by which a rollout's reward goes through TRL to `handed_on`."""


def handed_on(score: Sequence[float], **_: Any) -> list[float | None]:
    """TRL's reward function: the scores that came with the rollouts. Where it gets none, the answer
    is left out of its group's mean and its advantage is 0."""
    return [None if math.isnan(reward) else reward for reward in score]


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt, and what they earned."""

    rollouts: list[Rollout]
    scores: list[Score]
    penalties: list[float]
    """What each answer's length costs."""

    @property
    def rewards(self) -> list[float]:
        """What trains; not a number where nobody could judge."""
        pairs = zip(self.scores, self.penalties, strict=True)
        return [score.reward - penalty for score, penalty in pairs]

    @property
    def judged(self) -> set[float]:
        """The different scores, whatever an answer's length costs."""
        return {score.reward for score in self.scores if not math.isnan(score.reward)}

    @property
    def spread(self) -> float:
        """The rewards' standard deviation; where it is 0, so is every advantage."""
        known = [reward for reward in self.rewards if not math.isnan(reward)]
        return pstdev(known) if known else 0.0


class GroupSampler:
    """Called by TRL with the visits of a sampling, each once for every sample; returns one answer
    for each."""

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        visits: Sequence[tuple[int, Row]],
        *,
        config: GrpoConfig,
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        """`visits` are (index of the task, row), unless `curriculum` chooses another row; `seed`
        decides which prompts take the place of those whose group has no spread."""
        self.engine, self.tasks, self.visits = engine, tasks, visits
        self.config, self.size, self._seed = config, config.samples_per_prompt, seed
        self._curriculum = curriculum
        self._chosen: dict[tuple[int, int], Row] = {}
        """Of this sampling, by visit and attempt."""
        self._metrics: dict[str, float] = {}
        self._scoring_s = 0.0

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """The fields TRL asks for, and the rewards in `FIELD`, in the order of `prompts`."""
        self.engine.version = trainer.state.global_step
        start, self._scoring_s = time.perf_counter(), 0.0
        visits = [int(prompt) for prompt in prompts[:: self.size]]
        graders, tools = self._num_grader_failures(), self._num_tool_failures()
        judged = self._num_unjudged_and_votes()
        self._chosen = {}
        if self._curriculum is not None:
            self._curriculum.begin(self.engine.version)
        first = self.answered(visits)
        groups, num_tokens, num_refills = self._refilled(first)
        found = [groups[visit] for visit in visits]
        self._metrics = {
            **self._summary(found),
            "groups_without_spread": fmean(group.spread == 0 for group in first.values()),
            **({"groups_refilled": num_refills} if self.config.refill_rounds else {}),
            "tokens": num_tokens,
            "grader_failures": self._num_grader_failures() - graders,
            "tool_failures": self._num_tool_failures() - tools,
            **self._judge_metrics(judged),
            "sampling_s": round(time.perf_counter() - start - self._scoring_s, 3),
            "scoring_s": round(self._scoring_s, 3),
        }
        return as_trl(
            [rollout for group in found for rollout in group.rollouts],
            [reward for group in found for reward in group.rewards],
        )

    def _choose(self, visit: int, attempt: int) -> Row:
        """The row of a visit, by what was measured before; attempts above 0 take another."""
        task, planned = self.visits[visit]
        rows = self._alike(visit)
        if attempt:
            if self._curriculum is not None:
                rows = self._curriculum.teaching(task, rows)
            return Random(f"{self._seed}/{visit}/{attempt}").choice(self._others(visit, rows))
        if self._curriculum is None:
            return planned
        return self._curriculum.choose(visit, task, planned, rows)

    def _others(self, visit: int, rows: Sequence[Row]) -> Sequence[Row]:
        """Of `rows` those that this sampling has not asked; if it has asked all, those that this
        visit has not; if it has asked all, all."""
        task = self.visits[visit][0]
        asked = {row.id for (v, _), row in self._chosen.items() if self.visits[v][0] == task}
        own = {row.id for (v, _), row in self._chosen.items() if v == visit}
        fresh = [row for row in rows if row.id not in asked]
        return fresh or [row for row in rows if row.id not in own] or rows

    def _record(self, groups: dict[int, Group], attempt: int) -> None:
        if self._curriculum is None:
            return
        for visit, group in groups.items():
            if all(map(math.isnan, group.rewards)):
                continue  # nobody could judge: nothing was measured
            self._curriculum.record(
                self.engine.version,
                self.visits[visit][0],
                self._row(visit, attempt),
                has_spread=len(group.judged) > 1,
            )

    def read_metrics(self) -> dict[str, float]:
        """Those of the last sampling, once."""
        found, self._metrics = self._metrics, {}
        return found

    def answered(self, visits: Sequence[int], attempt: int = 0) -> dict[int, Group]:
        """A group for each visit; those of attempts above 0 answer other prompts. What they show of
        their prompts is recorded."""
        sampled = self.sample(visits, attempt)
        start = time.perf_counter()
        scores = self.score(visits, sampled)
        self._scoring_s += time.perf_counter() - start
        penalties = [
            self._penalties(self._task(v), g) for v, g in zip(visits, sampled, strict=True)
        ]
        found = dict(zip(visits, map(Group, sampled, scores, penalties), strict=True))
        self._record(found, attempt)
        return found

    def _penalties(self, task: Task, group: Sequence[Rollout]) -> list[float]:
        config, spec = self.config.length_penalty, task.spec
        if config is None:
            return [0.0] * len(group)
        return [
            length_penalty(sum(r.is_own), spec.effort, limit=spec.max_new_tokens, config=config)
            for r in group
        ]

    def _refilled(self, first: dict[int, Group]) -> tuple[dict[int, Group], int, int]:
        """Groups with other prompts in place of those without spread, as far as the rounds go; how
        many own tokens all took, and how many were found."""
        groups, num_tokens = dict(first), num_own(first.values())
        lacking = [visit for visit, group in first.items() if group.spread == 0]
        for attempt in range(1, self.config.refill_rounds + 1):
            if still := [visit for visit in lacking if groups[visit].spread == 0]:
                found = self.answered(still, attempt)
                groups |= found
                num_tokens += num_own(found.values())
        return groups, num_tokens, sum(groups[visit].spread > 0 for visit in lacking)

    def sample(self, visits: Sequence[int], attempt: int = 0) -> list[list[Rollout]]:
        """A group for each visit. Visit and attempt make its samples' seeds fresh."""
        requests = [
            replace(
                request,
                top_p=self.config.top_p,
                top_k=self.config.top_k,
                wants_support=self.config.top_p < 1 or self.config.top_k > 0,
                wants_routes=self.config.keep_routing,
            )
            for visit in visits
            for request in self._task(visit).requests(
                [self._row(visit, attempt)],
                sample=(attempt * len(self.visits) + visit) * self.size,
                num_samples=self.size,
                temperature=self.config.temperature,
            )
        ]
        found = {(r.domain, r.prompt_id, r.sample): r for r in self.engine.run(requests)}
        ordered = [found[r.domain, r.prompt_id, r.sample] for r in requests]
        return [ordered[i : i + self.size] for i in range(0, len(ordered), self.size)]

    def score(
        self, visits: Sequence[int], groups: Sequence[Sequence[Rollout]]
    ) -> list[list[Score]]:
        """The scores of every group's rollouts."""
        found: dict[int, list[Score]] = {}
        for number, task in enumerate(self.tasks):
            mine = [i for i, visit in enumerate(visits) if self.visits[visit][0] == number]
            scores = task.score([rollout for i in mine for rollout in groups[i]])
            for place, i in enumerate(mine):
                found[i] = scores[place * self.size : (place + 1) * self.size]
        return [found[i] for i in range(len(visits))]

    def _num_grader_failures(self) -> int:
        """Answers that no reward could judge, so far; each was scored 0."""
        return sum(sum(task.failures.values()) for task in self.tasks)

    def _num_tool_failures(self) -> int:
        """Calls of a tool that raised or did not answer in time, so far."""
        return sum(sum(task.tool_failures.values()) for task in self.tasks)

    def _num_unjudged_and_votes(self) -> tuple[int, int, int]:
        """Answers that no judge's vote could be read for, votes, and those that could not be read,
        so far."""
        votes = [task.votes for task in self.tasks]
        unjudged = sum(task.unjudged for task in self.tasks)
        return unjudged, sum(cast for cast, _ in votes), sum(unread for _, unread in votes)

    def _judge_metrics(self, before: tuple[int, int, int]) -> dict[str, float]:
        """Of this sampling, refilled groups included; nothing where nobody judges."""
        unjudged, num_votes, num_unread = (
            now - then for now, then in zip(self._num_unjudged_and_votes(), before, strict=True)
        )
        if not num_votes:
            return {}
        return {"judge_unparsed": unjudged, "votes_unparsed": num_unread / num_votes}

    def _task(self, visit: int) -> Task:
        return self.tasks[self.visits[visit][0]]

    def _row(self, visit: int, attempt: int) -> Row:
        if (visit, attempt) not in self._chosen:
            self._chosen[visit, attempt] = self._choose(visit, attempt)
        return self._chosen[visit, attempt]

    def _alike(self, visit: int) -> list[Row]:
        """The prompts that may take the place of a visit's: of its domain and part of a mixture."""
        rows, source = self._task(visit).train, self.visits[visit][1].source
        return [row for row in rows if row.source == source]

    def _summary(self, groups: Sequence[Group]) -> dict[str, float]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]
        names = list(dict.fromkeys(name for score in scores for name in score.terms))
        by_domain = {
            f"reward/{task.name}": mean_reward(
                score
                for score, rollout in zip(scores, rollouts, strict=True)
                if rollout.domain == task.name
            )
            for task in self.tasks
        }
        by_term = {
            f"term/{name}": fmean(score.terms[name] for score in scores if name in score.terms)
            for name in names
        }
        return {
            "reward": mean_reward(scores),
            **(by_domain if len(self.tasks) > 1 else {}),
            **(by_term if len(names) > 1 else {}),
            **(
                {"length_penalty": fmean(p for group in groups for p in group.penalties)}
                if self.config.length_penalty
                else {}
            ),
            "reward_std": fmean(group.spread for group in groups),
            "length": fmean(sum(rollout.is_own) for rollout in rollouts),
            "truncated": fmean(rollout.finish_reason == "length" for rollout in rollouts),
        }


def as_trl(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, list[Any]]:
    """What TRL's rollout_func returns. TRL reads an answer's last token, so none may be empty."""
    assert all(rollout.response for rollout in rollouts), "the engine gave an empty response"
    return {
        "prompt_ids": [rollout.prompt for rollout in rollouts],
        "completion_ids": [rollout.response for rollout in rollouts],
        "logprobs": [rollout.kept_logp or rollout.logp for rollout in rollouts],
        "env_mask": [[int(own) for own in rollout.is_own] for rollout in rollouts],
        FIELD: list(rewards),
        **fields_of(rollouts),
    }


def num_own(groups: Iterable[Group]) -> int:
    """Own tokens of all rollouts."""
    return sum(sum(rollout.is_own) for group in groups for rollout in group.rollouts)
