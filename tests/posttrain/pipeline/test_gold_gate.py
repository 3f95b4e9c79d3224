"""A run grades the gold answers of what it will train on, once a content, before it trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.pipeline import gold, gold_gate, source
from posttrain.pipeline.gold_gate import check_golds, trained
from posttrain.pipeline.recipe_file import load_recipe
from posttrain.pipeline.run import run
from posttrain.pipeline.stages import build

RECIPE = """\
name: mine
base: {preset: tiny, pretrain: {mixture: [{data: {jsonl: sums.jsonl}}]}}
domains:
  sums:
    data: {jsonl: sums.jsonl}
    grpo: {num_steps: 2}
    reward: mathematics
    efforts: [none, high]
  kind: {data: {jsonl: kind.jsonl}, sft: {num_steps: 2}, reward: "my_kind:score"}
  unseen: {data: {jsonl: kind.jsonl}, reward: "my_kind:score"}
evaluate: {num_prompts: 2}
"""
KIND = "def score(response, *, answer, **row):\n    return float(response == answer)\n"


class Folder:
    """A recipe's, and what a check of it says."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        (folder / "my_kind.py").write_text(KIND)
        (folder / "mine.yaml").write_text(RECIPE)
        self.rows("sums.jsonl", [f"{n}" for n in range(20)])
        self.rows("kind.jsonl", [f"{n}" for n in range(20)])

    def rows(self, name: str, responses: list[str], *, wrong: tuple[int, ...] = ()) -> None:
        """Rows whose gold is right but for those at the places `wrong`."""
        rows: list[dict[str, Any]] = [
            {"prompt": f"{n}?", "response": text, "answer": "77" if n in wrong else text}
            for n, text in enumerate(responses)
        ]
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def check(self, *overrides: str) -> list[str]:
        file = load_recipe(str(self.path / "mine.yaml"), overrides)
        said: list[str] = []
        stages = build(file.recipe, file.folder)
        check_golds(file.recipe, file.folder, self.path / "runs", stages, said.append)
        return said


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_domain_that_is_trained_is_graded_and_no_other(folder: Folder) -> None:
    said = folder.check()
    assert [line.split(":")[0].split() for line in said] == [["gold", "sums"], ["gold", "kind"]]
    assert all("20 of 20 gold answers score 1, 0 of" in line for line in said)


def test_one_bad_gold_ends_the_run_and_is_named(folder: Folder) -> None:
    folder.rows("kind.jsonl", [f"{n}" for n in range(20)], wrong=(6,))
    message = (
        r"domain 'kind', reward 'my_kind:score': the gold answer '6' to row 7, '6\?', scores 0: .*"
        r"let 1 bad rows .* by domains\.kind\.bad_gold: 1"
    )
    for _ in range(2):  # known from the record as it was when it was graded
        with pytest.raises(DataError, match=message):
            folder.check()
    assert (folder.path / "runs" / "gold.json").exists()


def test_nothing_is_trained_before_the_check(folder: Folder) -> None:
    folder.rows("kind.jsonl", [f"{n}" for n in range(20)], wrong=(6,))
    file = load_recipe(str(folder.path / "mine.yaml"))
    with pytest.raises(DataError, match="the gold answer '6' to row 7"):
        run(file.recipe, file.folder, folder.path / "runs")
    assert not list((folder.path / "runs" / "stages").glob("*"))


def test_known_bad_rows_pass_up_to_their_count_and_are_counted(folder: Folder) -> None:
    folder.rows("kind.jsonl", [f"{n}" for n in range(20)], wrong=(6, 9))
    with pytest.raises(DataError, match="'6' to row 7"):
        folder.check("domains.kind.bad_gold=1")
    (said,) = folder.check("domains.kind.bad_gold=2")
    assert "18 of 20 gold answers score 1" in said
    assert "2 bad rows are known" in said
    record = json.loads((folder.path / "runs" / "gold.json").read_text())
    (facts,) = record["kind"]["facts"]
    assert facts["num_bad"] == 2
    assert "'6' to row 7" in facts["known"][0]


def test_a_reward_that_gives_no_gold_one_passes_where_all_may(folder: Folder) -> None:
    (folder.path / "my_kind.py").write_text("def score(response, **row):\n    return 0.5\n")
    with pytest.raises(DataError, match="bad_gold: 20"):
        folder.check()
    assert "20 bad rows are known" in folder.check("domains.kind.bad_gold=all")[-1]


def test_a_grader_that_pays_for_silence_ends_the_run(folder: Folder) -> None:
    (folder.path / "my_kind.py").write_text("def score(response, **row):\n    return 1.0\n")
    with pytest.raises(DataError, match=r"a wrong answer '' to row 1, '0\?', scores 1"):
        folder.check()


@pytest.mark.parametrize("changed", ["nothing", "a row", "the grader", "the other's setting"])
def test_what_was_graded_is_graded_again_only_if_it_changed(folder: Folder, changed: str) -> None:
    folder.check()
    overrides: list[str] = []
    if changed == "a row":
        folder.rows("kind.jsonl", [f"{n}" for n in range(21)])
    elif changed == "the grader":
        (folder.path / "my_kind.py").write_text(KIND + "\n# otherwise\n")
        source._digest.cache_clear()  # files are read once a process; these change
    elif changed == "the other's setting":
        overrides = ["domains.sums.reward_timeout_s=4"]
    expected = {"nothing": [], "the other's setting": ["sums"]}.get(changed, ["kind"])
    assert [line.split()[1].rstrip(":") for line in folder.check(*overrides)] == expected


def test_a_long_check_says_how_far_it_is(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold, "TOLD_EVERY", 30)
    monkeypatch.setattr(gold_gate, "TELL_EVERY_S", 0.0)
    said = folder.check()
    assert [line for line in said if "answers graded" in line][:3] == [
        "gold     sums: 30 of 80 answers graded",
        "gold     sums: 60 of 80 answers graded",
        "gold     sums: 80 of 80 answers graded",
    ]


def test_a_run_with_nothing_left_to_train_grades_nothing(folder: Folder) -> None:
    file = load_recipe(str(folder.path / "mine.yaml"))
    stages = build(file.recipe, file.folder)
    assert trained(file.recipe, stages) == ["sums", "kind"]
    rest = [stage for stage in stages if stage.name.startswith(("evaluate/", "report", "base"))]
    assert trained(file.recipe, rest) == []
