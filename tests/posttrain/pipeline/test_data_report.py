"""The doctor tells which train prompts are near a test's, left out of training or not."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.domains import is_heldout
from posttrain.pipeline.data_report import check_overlaps
from posttrain.pipeline.recipe_file import load_recipe

RECIPE = """\
name: mine
base: {preset: tiny, pretrain: {mixture: [{data: {jsonl: rows.jsonl}}]}}
domains:
  clean: {data: {jsonl: rows.jsonl}, grpo: {num_steps: 2}, reward: exact, decontaminate: {}}
  plain: {data: {jsonl: rows.jsonl}, grpo: {num_steps: 2}, reward: exact}
  other: {data: {jsonl: other.jsonl}, grpo: {num_steps: 2}, reward: exact}
  streamed: {data: {jsonl: rows.jsonl, streaming: true}, grpo: {num_steps: 2}, reward: exact}
"""


HEAD_WORDS = ["domain", "train", "held", "out", "near", "a", "test's", "most"]


def is_held(text: str) -> bool:
    return is_heldout([{"role": "user", "content": text}], 0.125)


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[str, set[str]]:
    """A recipe, and its train prompts that say what held-out ones say."""
    rng = Random(2)
    texts = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(12)) for _ in range(80)]
    near = {f"{text}!" for text in texts if is_held(text)}
    near = {text for text in near if not is_held(text)}

    def write(name: str, texts: list[str]) -> None:
        rows: list[dict[str, Any]] = [
            {"prompt": text, "answer": str(i), "response": str(i)} for i, text in enumerate(texts)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("rows.jsonl", [*texts, *near])
    twice = [f"{text} twice" for text in texts if not is_held(text)]
    write("other.jsonl", [*texts, *(text for text in twice if not is_held(text))])
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert len(near) > 3
    return str(tmp_path / "mine.yaml"), near


def test_every_domain_is_compared_and_says_what_becomes_of_the_near_ones(
    recipe: tuple[str, set[str]],
) -> None:
    path, near = recipe
    facts = {found.domain: found for found in check_overlaps(load_recipe(path))}
    for name, is_left_out in (("clean", True), ("plain", False)):
        assert {pair["train"] for pair in facts[name].pairs} == near
        assert facts[name].is_left_out == is_left_out
        assert facts[name].duplicates == []
    assert facts["other"].pairs == []
    twice = {pair["train"] for pair in facts["other"].duplicates}
    assert twice
    assert twice <= {f"{pair['test']} twice" for pair in facts["other"].duplicates}
    assert not facts["streamed"].is_compared


def test_the_doctor_prints_the_table_without_training(
    recipe: tuple[str, set[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, near = recipe
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", path])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [*HEAD_WORDS, "near", "an", "earlier", "one"] in lines
    (clean,) = (line for line in lines if line[:1] == ["clean"] and line[1].isdigit())
    assert clean[3:] == [f"{len(near)},", "left", "out", "1.00", "0"]
    assert not (tmp_path / "runs").exists()
    facts = json.loads(CliRunner().invoke(app, ["doctor", path, "--json"]).stdout)
    assert [len(found["pairs"]) for found in facts["overlaps"]] == [len(near), len(near), 0, 0]
