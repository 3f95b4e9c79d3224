"""Groups of answers for GRPO: TRL's `rollout_func`, its rewards, and what a step logs.

The data set that TRL sees holds the numbers of visits ("0", "1", ...), in the order in which the
prompts are to be visited; a visit's group is sampled, scored and handed back as token ids.
"""

import time
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev
from typing import Any

from posttrain.domains import Row
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task

FIELD = "score"
"""The extra field by which a rollout's reward goes through TRL to `handed_on`."""


def handed_on(score: Sequence[float], **_: Any) -> list[float | None]:
    """TRL's reward function: the scores that came with the rollouts."""
    return list(score)


class GroupSampler:
    """Called by TRL with a step's visits, each `group` times; returns one answer for each."""

    def __init__(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        visits: Sequence[tuple[int, Row]],
        *,
        group: int,
        temperature: float,
    ) -> None:
        self.engine, self.tasks, self.visits = engine, tasks, visits
        self.group, self.temperature = group, temperature
        self._metrics: dict[str, float] = {}

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """The fields TRL asks for, and the rewards in `FIELD`, in the order of `prompts`."""
        self.engine.version = trainer.state.global_step
        start = time.perf_counter()
        visits = [int(prompt) for prompt in prompts[:: self.group]]
        graders, tools = self._num_grader_failures(), self._num_tool_failures()
        groups = self.sample(visits)
        sampled = time.perf_counter()
        rewards = self.score(visits, groups)
        self._metrics = {
            **self._summary(groups, rewards),
            "grader_failures": self._num_grader_failures() - graders,
            "tool_failures": self._num_tool_failures() - tools,
            "sampling_s": round(sampled - start, 3),
            "scoring_s": round(time.perf_counter() - sampled, 3),
        }
        return as_trl([rollout for group in groups for rollout in group], rewards)

    def read_metrics(self) -> dict[str, float]:
        """The last step's."""
        return self._metrics

    def sample(self, visits: Sequence[int]) -> list[list[Rollout]]:
        """A group for each visit. A visit's number makes its samples' seeds fresh."""
        requests = [
            request
            for visit in visits
            for request in self._task(visit).requests(
                [self.visits[visit][1]],
                sample=visit * self.group,
                num_samples=self.group,
                temperature=self.temperature,
            )
        ]
        found = {(r.domain, r.prompt_id, r.sample): r for r in self.engine.run(requests)}
        ordered = [found[r.domain, r.prompt_id, r.sample] for r in requests]
        return [ordered[i : i + self.group] for i in range(0, len(ordered), self.group)]

    def score(self, visits: Sequence[int], groups: Sequence[Sequence[Rollout]]) -> list[float]:
        """The reward of every rollout, group after group."""
        rewards: dict[int, list[float]] = {}
        for number, task in enumerate(self.tasks):
            mine = [i for i, visit in enumerate(visits) if self.visits[visit][0] == number]
            scores = task.score([rollout for i in mine for rollout in groups[i]])
            for place, i in enumerate(mine):
                part = scores[place * self.group : (place + 1) * self.group]
                rewards[i] = [score.reward for score in part]
        return [reward for i in range(len(visits)) for reward in rewards[i]]

    def _num_grader_failures(self) -> int:
        """Answers that no reward could judge, so far; each was scored 0."""
        return sum(sum(task.failures.values()) for task in self.tasks)

    def _num_tool_failures(self) -> int:
        """Calls of a tool that raised or did not answer in time, so far."""
        return sum(sum(task.tool_failures.values()) for task in self.tasks)

    def _task(self, visit: int) -> Task:
        return self.tasks[self.visits[visit][0]]

    def _summary(
        self, groups: Sequence[Sequence[Rollout]], rewards: Sequence[float]
    ) -> dict[str, float]:
        rollouts = [rollout for group in groups for rollout in group]
        spreads = [pstdev(rewards[i : i + self.group]) for i in range(0, len(rewards), self.group)]
        by_domain = {
            f"reward/{task.name}": _mean(
                reward
                for reward, rollout in zip(rewards, rollouts, strict=True)
                if rollout.domain == task.name
            )
            for task in self.tasks
        }
        return {
            "reward": fmean(rewards),
            **(by_domain if len(self.tasks) > 1 else {}),
            "reward_std": fmean(spreads),
            "groups_without_spread": fmean(spread == 0 for spread in spreads),
            "tokens": sum(sum(rollout.is_own) for rollout in rollouts),
            "length": fmean(sum(rollout.is_own) for rollout in rollouts),
            "truncated": fmean(rollout.finish_reason == "length" for rollout in rollouts),
        }


def as_trl(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, list[Any]]:
    """What TRL's rollout_func returns. TRL reads an answer's last token, so none may be empty."""
    assert all(rollout.response for rollout in rollouts), "the engine gave an empty response"
    return {
        "prompt_ids": [rollout.prompt for rollout in rollouts],
        "completion_ids": [rollout.response for rollout in rollouts],
        "logprobs": [rollout.logp for rollout in rollouts],
        "env_mask": [[int(own) for own in rollout.is_own] for rollout in rollouts],
        FIELD: list(rewards),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return fmean(listed) if listed else float("nan")
