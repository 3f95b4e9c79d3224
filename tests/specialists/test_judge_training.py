"""A judge is made better by reinforcement on gold verdicts."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import pytest
import torch
from judge_models import saved, spelling
from lookup_models import looking_up

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.judge import JudgeModel
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task
from posttrain.tokenizer import EOS, build_tokenizer
from specialists import grpo
from specialists.config import GrpoConfig, GrpoStage

NewJob = Callable[..., Job]
MARKS, LETTERS, LENGTH = "#@^~", "bkqxyz", 40


def judged_answers(number: int) -> list[dict[str, Any]]:
    """Answers of which seven tenths or more are marks, or letters, and what their verdict should
    be; the rubric is one that says so."""
    rng = Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(number):
        is_good = rng.random() < 0.5
        num_others = rng.randint(0, 12)
        kinds = (MARKS, LETTERS) if is_good else (LETTERS, MARKS)
        drawn = rng.choices(kinds[0], k=LENGTH - num_others) + rng.choices(kinds[1], k=num_others)
        rng.shuffle(drawn)
        row = {"prompt": f"Draw {i}.", "rubric": "Mostly marks.", "answer": "".join(drawn)}
        rows.append({**row, "gold_verdict": 9 if is_good else 2})
    return rows


@pytest.fixture
def untaught(tmp_path: Path) -> Path:
    """A finished stage whose model says `Score: 2` or `Score: 9`, whatever it reads: its attention,
    the same to all tokens, sees how many are of which kind, and its head makes nothing of that."""
    tokenizer = build_tokenizer()
    ids: dict[str, int] = tokenizer.get_vocab()
    following: dict[str, Any] = {**spelling("Score: "), "Ġ": ["2", "9"], "2": EOS, "9": EOS}
    model = looking_up(tokenizer, following, weight=1.5)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for number, character in enumerate(LETTERS + MARKS):
            attention.v_proj.weight[0, ids[character]] = -1.0 if number < len(LETTERS) else 1.0
        attention.o_proj.weight[-1, 0] = 1.0
    saved(JudgeModel(model, tokenizer), tmp_path / "untaught" / "checkpoint")
    return tmp_path / "untaught"


def accuracy(spec: DomainSpec, stage: Path, job: Job) -> float:
    """Share of gold verdicts, word for word, among those sampled on held-out answers."""
    model: Any = load_model(stage / "checkpoint")
    tokenizer = load_tokenizer(stage / "checkpoint")
    with closing(Task(spec, tokenizer, folder=job.folder, seed=0)) as task:
        gold = {row.id: f"Score: {row.fields['gold_verdict']}" for row in task.heldout}
        assert len(gold) > 20
        requests = task.requests(task.heldout, num_samples=4)
        rollouts = list(Engine(model, num_slots=40, seed=1).run(requests))
        said = [(gold[r.prompt_id], task.turns(r)[-1]["content"]) for r in rollouts]
    return fmean(wanted == found for wanted, found in said)


def test_a_judge_learns_from_gold_verdicts(
    untaught: Path, recipe_folder: Path, new_job: NewJob
) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in judged_answers(120))
    (recipe_folder / "verdicts.jsonl").write_text(rows)
    spec = DomainSpec.model_validate(
        {
            "name": "verdicts",
            "data": {"jsonl": "verdicts.jsonl", "convert": "posttrain.judge_prompts:judging_row"},
            "reward": "verdicts",
            "heldout_share": 0.25,
            "max_new_tokens": 10,
        }
    )
    job = new_job("grpo", {"start": untaught})
    config = {
        "num_steps": 12,
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
        "num_slots": 32,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.0),
    }
    grpo.work(GrpoStage(domains=[spec], grpo=GrpoConfig.model_validate(config)), job)
    before, after = accuracy(spec, untaught, job), accuracy(spec, job.out, job)
    assert 0.3 < before < 0.7
    assert after > 0.9
