"""Small V4 checkpoints of different weights, written once; the modules beside this one are
importable by name."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
