"""A start checkpoint with a very small V4, and a domain of short words to reverse."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.checkpoints import save_checkpoint
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.tokenizer import build_tokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # for stage_runs.py and judge_models.py

NewJob = Callable[..., Job]

REWARD = '''
def share_of_a(response, *, answer=None, **row):
    """A reward that an untrained model earns now and then: the share of its letters below n."""
    return sum(letter < "n" for letter in response) / max(len(response), 1)
'''


def small_model(tokenizer: Any, *, seed: int) -> V4ForCausalLM:
    """All of the tiny preset's mechanisms at a quarter of its width."""
    config = preset_config(
        "tiny",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.hidden_size = config.moe_intermediate_size = 32
    config.indexer_loss_weight = 0.0  # gradients here are those of the trainer's own loss
    torch.manual_seed(seed)
    return V4ForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def start(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage's folder: it holds checkpoint/."""
    folder = tmp_path_factory.mktemp("start")
    save_checkpoint(small_model(tokenizer, seed=1), tokenizer, folder / "checkpoint")
    return folder


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a recipe would lie: words.jsonl (96 rows of 2 to 9 letters) and a reward module."""
    folder = tmp_path_factory.mktemp("recipe")
    rng = Random(0)
    words = ["".join(rng.choices("abxyz", k=rng.randint(2, 9))) for _ in range(96)]
    rows = [{"prompt": word, "response": word[::-1], "answer": word[::-1]} for word in words]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_letters.py").write_text(REWARD)
    return folder


@pytest.fixture
def words(recipe_folder: Path) -> DomainSpec:
    assert recipe_folder.exists()
    return DomainSpec.model_validate(
        {
            "name": "words",
            "data": {"jsonl": "words.jsonl"},
            "reward": "my_letters:share_of_a",
            "max_new_tokens": 8,
        }
    )


@pytest.fixture
def new_job(recipe_folder: Path, tmp_path: Path) -> NewJob:
    """`new_job("a", {"start": folder})`: a job that works in tmp_path/a; more of `Job` by name."""

    def make(
        name: str, inputs: Mapping[str, Path] | None = None, *, metrics: Metrics | None = None
    ) -> Job:
        out = tmp_path / name
        return Job(
            out=out,
            inputs=inputs or {},
            folder=recipe_folder,
            seed=3,
            num_threads=1,
            metrics=metrics or Metrics(out / "metrics.jsonl", stage=name),
        )

    return make


class Cut(Metrics):
    """Metrics of a run that is interrupted when it logs the first step after `last`."""

    def __init__(self, path: Path, *, last: int) -> None:
        super().__init__(path, stage="cut")
        self.last = last

    def log(self, step: int, total: int, **values: float | int | str) -> None:
        if step > self.last:
            raise KeyboardInterrupt
        super().log(step, total, **values)


@pytest.fixture
def cut_after() -> Callable[[Path, int], Metrics]:
    return lambda out, last: Cut(out / "metrics.jsonl", last=last)
