"""A recipe of one's own, with its data and its reward module, as tests write and check it."""

import json
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.recipe_file import RecipeFile, load_recipe

RECIPE = """\
name: mine
base:
  preset: tiny
  pretrain:
    mixture:
      - data: {jsonl: rows.jsonl}
domains:
  letters:
    data:
      jsonl: rows.jsonl
    reward: my_rewards:letters
    max_new_tokens: 16
    sft:
      num_steps: 2
    grpo: {num_steps: 3}
distill: {num_steps: 2}
baselines: [average]
"""


def write_recipe(folder: Path, text: str = RECIPE, *, num_rows: int = 64) -> Path:
    """A recipe with its data and its reward module, in a folder of its own."""
    rows = [{"prompt": f"say {i}", "response": str(i), "answer": str(i)} for i in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = "def letters(response, *, answer=None, **row):\n    return float(response == answer)\n"
    (folder / "my_rewards.py").write_text(module)
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def checked(path: Path, *overrides: str) -> RecipeFile:
    file = load_recipe(str(path), overrides)
    check_recipe(file)
    return file


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(path, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def line_of(path: Path, text: str) -> str:
    """`FILE:LINE` of the first line that holds `text`."""
    lines = path.read_text().splitlines()
    return f"{path}:{next(i for i, line in enumerate(lines, 1) if text in line)}"
