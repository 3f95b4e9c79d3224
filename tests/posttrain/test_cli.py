"""Laws of the command: quick to help, one line and exit code 2 for a user's mistake."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.checkpoints import save_checkpoint
from posttrain.generate import Telling, generate
from posttrain.rollout.types import Request
from posttrain.tokenizer import EOS, SPECIAL_TOKENS, build_tokenizer, encode_plain


def posttrain(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny V4, saved as a stage leaves it."""
    folder = tmp_path_factory.mktemp("stage")
    tokenizer = build_tokenizer()
    config = preset_config(
        "tiny", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = V4ForCausalLM(config)
    save_checkpoint(model, tokenizer, folder / "checkpoint")
    return folder


def test_help_answers_at_once_and_names_every_verb() -> None:
    # CPU seconds of the child, since other processes may hold the cores; 0.3 s when measured alone
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = posttrain("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    for verb in ("run", "plan", "recipes", "schema", "evaluate", "generate", "report", "doctor"):
        assert f" {verb} " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "quikstart"),
        ("run", "quickstart", "--set", "sed=1"),
        ("plan", "quickstart", "--set", "seed=x"),
        ("evaluate", "nowhere", "--recipe", "quickstart"),
        ("generate", "nowhere", "hello"),
        ("report", "nowhere"),
        ("doctor", "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = posttrain(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("posttrain: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_recipes_and_schema_print_for_machines() -> None:
    assert {"quickstart", "smoke"} <= json.loads(posttrain("recipes", "--json").stdout).keys()
    assert "domains" in json.loads(posttrain("schema").stdout)["properties"]


def test_plan_computes_nothing_and_lists_every_stage(tmp_path: Path) -> None:
    result = posttrain("plan", "smoke", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for stage in ("base", "sft/mathematics", "grpo/agent", "average", "ties", "opd", "report"):
        assert f"{stage} " in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_answer(checkpoint: Path) -> None:
    def answer(seed: int) -> str:
        pieces: list[str] = []
        rollout = generate(
            checkpoint / "checkpoint", "2+2=", on_text=pieces.append, max_new_tokens=12, seed=seed
        )
        assert len(rollout.response) <= 12
        return "".join(pieces)

    assert answer(3) == answer(3) != answer(4)


def test_the_streamed_pieces_are_the_answer(checkpoint: Path) -> None:
    tokenizer = build_tokenizer()
    ids = encode_plain(tokenizer, "héé ｜ ok")
    pieces: list[str] = []
    tell, request = Telling(tokenizer, pieces.append), Request("streamed", ids[:1])
    for end in range(1, len(ids) + 1):
        tell(request, ids[:end])
    tell(request, [*ids, SPECIAL_TOKENS.index(EOS)])
    assert "".join(pieces) == "héé ｜ ok"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
