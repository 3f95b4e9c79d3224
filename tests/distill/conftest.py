"""Small V4 checkpoints of different weights, written once, and distillations of them; `killed` is
importable by name."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import OpdStage
from distill.opd import work
from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.checkpoints import save_checkpoint
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.tokenizer import build_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))

NAMES = ("base", "specialist/mathematics", "specialist/code")
DOMAINS = ("mathematics", "code")
SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "sliding_window": 6, "index_topk": 3}


def tiny_model(seed: int, vocab_size: int, **sizes: Any) -> V4ForCausalLM:
    """The tiny preset at hidden size 32, with a head that has opinions."""
    config = preset_config(
        "tiny", vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    config.update({**SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        model.lm_head.weight.data *= 10
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., V4ForCausalLM]:
    """`make_model(seed, vocab_size, **config)`."""
    return tiny_model


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage folders by role, each with a checkpoint of its own weights."""
    folder, tokenizer = tmp_path_factory.mktemp("stages"), build_tokenizer()
    folders = {name: folder / name.replace("/", ".") for name in NAMES}
    for seed, path in enumerate(folders.values()):
        path.mkdir()
        save_checkpoint(tiny_model(seed, len(tokenizer)), tokenizer, path / "checkpoint")
    return folders


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise laws hold for a given number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_job(stages: dict[str, Path], tmp_path: Path) -> Callable[[str], Job]:
    """`make_job(name)`: a job with a folder of its own; prompts of two domains lie beside it."""
    for domain in DOMAINS:
        rows = [{"prompt": f"{domain} {i}", "answer": str(i)} for i in range(12)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{domain}.jsonl").write_text(lines)

    def make(name: str) -> Job:
        out = tmp_path / name
        out.mkdir()
        metrics = Metrics(out / "metrics.jsonl", stage="opd")
        return Job(out, stages, tmp_path, seed=0, num_threads=1, metrics=metrics)

    return make


def opd_stage(**distill: Any) -> OpdStage:
    """Two domains, four steps of six prompts, and what is given."""
    return OpdStage.model_validate(
        {
            "domains": [
                {
                    "name": domain,
                    "data": {"jsonl": f"{domain}.jsonl"},
                    "reward": "exact",
                    "max_new_tokens": 4,
                }
                for domain in DOMAINS
            ],
            "distill": {
                "num_steps": 4,
                "prompts_per_step": 6,
                "num_slots": 4,
                "rows_per_microbatch": 4,
                "checkpoint_every": 2,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "schedule": "linear"},
                **distill,
            },
            "teachers": {domain: f"specialist/{domain}" for domain in DOMAINS},
        }
    )


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., OpdStage]:
    """`make_stage(max_staleness=1)`: fields of `distill`."""
    return opd_stage


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[OpdStage, Job, int], None]:
    """`killed(stage, job, step)`: distils until it would log the step, and dies there."""
    log = Metrics.log

    def run(stage: OpdStage, job: Job, at: int) -> None:
        def dies(metrics: Metrics, step: int, total: int, **values: float | int | str) -> None:
            if step == at:
                raise KeyboardInterrupt
            log(metrics, step, total, **values)

        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "log", dies)
            with pytest.raises(KeyboardInterrupt):
                work(stage, job)

    return run


@pytest.fixture(scope="session")
def without_time() -> Callable[[Job], list[dict[str, Any]]]:
    """`without_time(job)`: what it logged, but for the seconds."""
    return lambda job: [
        {name: value for name, value in record.items() if name != "seconds"}
        for record in job.metrics.records()
    ]
