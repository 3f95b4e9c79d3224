"""GRPO in a simulated world, with a real model that calls its tools over several turns."""

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from judge_models import saved
from lookup_models import looking_up, with_words
from stage_runs import check_killed, trained

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.judge import JudgeModel
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task, spans
from posttrain.tokenizer import DSML, END_THINK, EOS
from specialists import grpo
from specialists.config import GrpoConfig, GrpoStage

NewJob = Callable[..., Job]

CALLS = {  # delete or get one of a, b, c, again and again, or end
    END_THINK: [f"\n\n<{DSML}tool_calls>\n", "d"],
    f"\n\n<{DSML}tool_calls>\n": f'<{DSML}invoke name="',
    f'<{DSML}invoke name="': ["delete", "get"],
    "delete": '">\n',
    "get": '">\n',
    '">\n': f'<{DSML}parameter name="',
    f'<{DSML}parameter name="': "key",
    "key": '" string="true">',
    '" string="true">': ["a", "b", "c"],
    **dict.fromkeys("abc", f"</{DSML}parameter>\n"),
    f"</{DSML}parameter>\n": f"</{DSML}invoke>\n",
    f"</{DSML}invoke>\n": f"</{DSML}tool_calls>",
    f"</{DSML}tool_calls>": EOS,
    "d": EOS,
}


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage whose model calls tools at random."""
    folder, tokenizer = tmp_path_factory.mktemp("caller"), with_words("delete", "get", "key")
    saved(JudgeModel(looking_up(tokenizer, CALLS, weight=1.0), tokenizer), folder / "checkpoint")
    return folder


@pytest.fixture
def store(recipe_folder: Path) -> DomainSpec:
    """Stores from which `a` is to be removed, and nothing else."""
    rows = [
        {
            "prompt": f"{i}: remove a.",
            "environment": {"kind": "store", "start": {"a": "1", "b": str(i), "c": "3"}},
            "state": {"b": str(i), "c": "3"},
        }
        for i in range(16)
    ]
    (recipe_folder / "stores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DomainSpec.model_validate(
        {
            "name": "store",
            "data": {"jsonl": "stores.jsonl"},
            "reward": "tools",
            "environment": "store",
            "max_new_tokens": 160,
        }
    )


def stage(spec: DomainSpec, **settings: Any) -> GrpoStage:
    optimizer = OptimizerConfig(name="adamw", learning_rate=0.03, weight_decay=0.0)
    defaults = {"prompts_per_step": 2, "samples_per_prompt": 8, "optimizer": optimizer}
    return GrpoStage(domains=[spec], grpo=GrpoConfig.model_validate({**defaults, **settings}))


def test_a_model_learns_to_bring_a_world_into_its_state(
    caller: Path, store: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": caller})
    grpo.work(stage(store, num_steps=10, prompts_per_step=1), job)
    records = trained(job)
    first, last = (fmean(r["reward"] for r in part) for part in (records[:3], records[-3:]))
    assert first < 0.3
    assert last > first + 0.4
    assert all(record["sampler_gap_max"] < 1e-4 for record in records)


def test_a_run_in_a_world_that_was_killed_goes_on_to_the_same_bits(
    caller: Path, store: DomainSpec, new_job: NewJob, cut_after: Callable[[Path, int], Metrics]
) -> None:
    config = stage(store, num_steps=3, checkpoint_every=1, samples_per_prompt=3)
    check_killed(partial(grpo.work, config), new_job, cut_after, start=caller, last=2)


def test_what_the_world_says_is_what_was_done_to_it(
    caller: Path, store: DomainSpec, new_job: NewJob
) -> None:
    tokenizer, model = load_tokenizer(caller / "checkpoint"), load_model(caller / "checkpoint")
    job = new_job("grpo")
    with closing(Task(store, tokenizer, folder=job.folder, seed=0)) as task:
        requests = task.requests(task.train[:4], num_samples=8)
        rollouts = list(Engine(model, num_slots=6, seed=0).run(requests))
        scores = task.score(rollouts)
        conversations = [task.turns(rollout) for rollout in rollouts]
    rows = {row.id: row for row in task.train}
    assert max(sum(m["role"] == "tool" for m in turns) for turns in conversations) > 2
    for rollout, turns, score in zip(rollouts, conversations, scores, strict=True):
        world = dict(rows[rollout.prompt_id].fields["environment"]["start"])
        for call, said in pairwise(turns):
            if call["role"] == "assistant" and said["role"] == "tool":
                assert said["content"].startswith(after(world, call["tool_calls"][0]))
        assert score.reward == float(world == rows[rollout.prompt_id].fields["state"])
        own = [ids for is_own, ids in spans(rollout) if is_own]
        assert all(ids[-1] == tokenizer.eos_token_id for ids in own[:-1])


def after(world: dict[str, str], call: dict[str, Any]) -> str:
    """What a store says to a call, and what the call makes of it."""
    key = call["arguments"]["key"]
    if key not in world:
        return "error"
    if call["name"] == "get":
        return world[key]
    del world[key]
    return "deleted"
