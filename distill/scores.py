"""The student's scores while it learns: held-out prompts, sampled at T = 1 and graded.

The prompts and the seeds of their samples are the same every time, so that two steps compare in
pairs, and nothing that training reads is touched: its weights are the same without any score.
"""

from collections.abc import Mapping

from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task, heldout_rows
from rewards.score import mean_reward


def heldout_requests(
    tasks: Mapping[str, Task], *, num_prompts: int, num_samples: int
) -> list[Request]:
    """Samples of the first `num_prompts` held-out prompts of each domain. Raises DataError where a
    domain has none."""
    return [
        request
        for task in tasks.values()
        for request in task.requests(heldout_rows(task, num_prompts), num_samples=num_samples)
    ]


def sampled_scores(
    engine: Engine, requests: list[Request], tasks: Mapping[str, Task]
) -> dict[str, float]:
    """`score/<domain>`: the mean over its samples; `score/macro`: the mean over the domains;
    `grader_failures`: answers that a reward could not judge, each scored 0; `judge_unparsed`, where
    there are any: those that no vote of a judge could be read for, which are in no mean."""
    rollouts: dict[str, list[Rollout]] = {name: [] for name in tasks}
    for rollout in sorted(engine.run(requests), key=lambda r: (r.prompt_id, r.sample)):
        rollouts[rollout.domain].append(rollout)
    failures = sum(sum(task.failures.values()) for task in tasks.values())
    unjudged = sum(task.unjudged for task in tasks.values())
    scores: dict[str, float] = {}
    for name, task in tasks.items():
        scores[f"score/{name}"] = mean_reward(task.score(rollouts[name]))
    macro = sum(scores.values()) / len(scores)
    failures = sum(sum(task.failures.values()) for task in tasks.values()) - failures
    unjudged = sum(task.unjudged for task in tasks.values()) - unjudged
    counts = {"grader_failures": failures, **({"judge_unparsed": unjudged} if unjudged else {})}
    return {**scores, "score/macro": macro, **counts}
