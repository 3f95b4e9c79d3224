"""Training makes answers longer where more effort is asked for, on a task in which work pays."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from judge_models import saved
from lookup_models import looking_up, with_words

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.judge import JudgeModel
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task
from posttrain.tokenizer import END_THINK, EOS, THINK
from specialists import grpo
from specialists.config import GrpoConfig, GrpoStage

NewJob = Callable[..., Job]

PAYS = '''
def pays(response: str, **row: object) -> float:
    """Each piece of work does 40% of what is left to do."""
    return 1 - 0.6 ** response.count("work")
'''


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage whose model stops working with every second token, whatever it is asked."""
    folder, tokenizer = tmp_path_factory.mktemp("worker"), with_words("work")
    following = {THINK: END_THINK, END_THINK: ["work", EOS], "work": ["work", EOS]}
    model = looking_up(tokenizer, following, weight=1.0)
    saved(JudgeModel(model, tokenizer), folder / "checkpoint")
    return folder


def task_of(recipe_folder: Path, effort: int) -> DomainSpec:
    (recipe_folder / "effort_pays.py").write_text(PAYS)
    return DomainSpec.model_validate(
        {
            "name": "work",
            "data": {"jsonl": "words.jsonl"},
            "reward": "effort_pays:pays",
            "effort": effort,
            "max_new_tokens": 24,
        }
    )


def measured(spec: DomainSpec, stage: Path, job: Job) -> tuple[float, float]:
    """Own tokens and score of an answer, means over held-out prompts."""
    model: Any = load_model(stage / "checkpoint")
    tokenizer = load_tokenizer(stage / "checkpoint")
    with closing(Task(spec, tokenizer, folder=job.folder, seed=0)) as task:
        requests = task.requests(task.heldout[:10], num_samples=20)
        rollouts = list(Engine(model, num_slots=50, seed=1).run(requests))
        scores = [score.reward for score in task.score(rollouts)]
    return fmean(sum(rollout.is_own) for rollout in rollouts), fmean(scores)


def test_after_training_more_effort_gives_longer_and_better_answers(
    worker: Path, recipe_folder: Path, new_job: NewJob
) -> None:
    before, after = [], []
    for effort in (5, 95):
        spec, job = task_of(recipe_folder, effort), new_job(f"grpo{effort}", {"start": worker})
        config = {
            "num_steps": 12,
            "prompts_per_step": 2,
            "samples_per_prompt": 16,
            "optimizer": OptimizerConfig(name="adamw", learning_rate=0.02, weight_decay=0.0),
            "length_penalty": {"k": 8.0, "tau": 20.0, "cap": 4.0},
        }
        grpo.work(GrpoStage(domains=[spec], grpo=GrpoConfig.model_validate(config)), job)
        before.append(measured(spec, worker, job))
        after.append(measured(spec, job.out, job))
    (low_before, _), (high_before, _) = before
    (low, low_score), (high, high_score) = after
    assert abs(high_before - low_before) < 0.5
    assert high > low + 4
    assert high > high_before + 4
    assert high_score > low_score + 0.2
