"""A recipe's graders on answers whose worth is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.domains import rows_to_check
from posttrain.errors import DataError, PosttrainError
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.gold import GoldFacts, GoldReport, check_gold
from posttrain.pipeline.recipe_file import load_recipe
from rewards.programs import sandbox_levels
from rewards.sandbox import Sandbox

RECIPE = """\
name: mine
base: {preset: tiny, pretrain: {mixture: [{data: {jsonl: rows.jsonl}}]}}
domains:
  mine:
    data: {jsonl: rows.jsonl}
    grpo: {num_steps: 2}
    reward: REWARD
"""


def report(folder: Path, reward: str, rows: list[dict[str, Any]], more: str = "") -> GoldReport:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("    reward: REWARD\n", f"    reward: {reward}\n{more}"))
    return check_gold(load_recipe(str(path)))


def examined(folder: Path, reward: str, rows: list[dict[str, Any]], more: str = "") -> GoldFacts:
    (facts,) = report(folder, reward, rows, more).facts
    return facts


def sums(number: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(number)]


STORE = {"kind": "store", "start": {}}
SET = {"name": "set", "arguments": {"key": "a"}}


@pytest.mark.parametrize(
    ("reward", "rows", "num_wrong"),
    [
        ("mathematics", sums(), 60),
        ("exact", sums(), 60),
        ("mathematics", [{**row, "response": f"it is {row['answer']}"} for row in sums()], 60),
        (
            "programs",
            [
                {
                    "prompt": f"times {n}",
                    "response": f"def f(x): return x * {n}",
                    "tests": [{"call": f"f({x})", "expect": str(x * n)} for x in (1, 2, 3)],
                }
                for n in range(2, 5)
            ],
            9,
        ),
        (
            "tools",
            [
                {
                    "prompt": f"put {n}",
                    "environment": STORE,
                    "solution": [{**SET, "arguments": {"key": "a", "value": str(n)}}],
                    "answer": f"put {n}",
                }
                for n in range(4)
            ],
            12,
        ),
        (
            "instructions",
            [
                {
                    "prompt": f"no commas, {n}",
                    "response": f"none at all {n}",
                    "instruction_id_list": ["punctuation:no_comma"],
                    "kwargs": [{}],
                }
                for n in range(3)
            ],
            3,  # silence: the rows ask for the same thing
        ),
        ("formats", [{"prompt": f"{n}?", "response": "it is so", "max_words": 3} for n in "ab"], 2),
    ],
)
def test_gold_scores_1_and_what_is_wrong_less(
    tmp_path: Path, reward: str, rows: list[dict[str, Any]], num_wrong: int
) -> None:
    more = "    reward_options: {sandbox: limits}\n" if reward == "programs" else ""
    if reward == "formats":
        more = "    reward_options: {min_words: 1}\n"
    facts = examined(tmp_path, reward, rows, more)
    assert facts.problems == []
    assert (facts.num_rows, facts.num_gold, facts.num_right) == (len(rows),) * 3
    assert facts.num_wrong == num_wrong


def test_gold_that_its_own_grader_refuses_is_told_with_its_row(tmp_path: Path) -> None:
    rows = [*sums(), {"prompt": "5+5=", "answer": "10", "response": "it is 11"}]
    facts = examined(tmp_path, "mathematics", rows)
    assert facts.num_right == len(rows) - 1
    (problem,) = facts.problems
    assert (
        "the gold answer 'it is 11' to row 21, '5+5=', scores 0: 'it is 11' against '10'" in problem
    )


def test_a_reward_of_the_users_beside_ours_is_told_to_be_unchecked(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brief(response, **row):\n    return 0.5\n")
    found = report(tmp_path, "{mathematics: 1, 'mine:brief': 0.2}", sums())
    assert [fact.reward for fact in found.facts] == ["mathematics", "mine:brief"]
    assert found.problems == []
    lines = found.text().splitlines()
    assert lines[1] == "mine: reward mine:brief, 20 rows: yours, beside others, not checked"


def test_a_grader_that_pays_for_anything_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "kind.py").write_text("def score(response, **row):\n    return 1.0\n")
    facts = examined(tmp_path, "kind:score", [{**row, "response": "2"} for row in sums()])
    assert facts.num_fooled == facts.num_wrong > 0
    assert "a wrong answer '' to" in facts.problems[0]


def test_rows_that_cannot_be_graded_are_told_even_without_gold(tmp_path: Path) -> None:
    rows = [
        {"prompt": "?", "instruction_id_list": ["no:such"], "kwargs": [{}]},
        {"prompt": "!", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]
    facts = examined(tmp_path, "instructions", rows)
    assert facts.num_gold == 0
    assert "1 answers could not be graded, such as: instructions: unknown" in facts.problems[0]


@pytest.mark.parametrize("name", ["gsm8k", "humaneval", "ifeval"])
def test_the_graders_of_real_data_tell_right_from_wrong_on_its_first_rows(
    tmp_path: Path, name: str
) -> None:
    file = load_recipe(name)
    data = next(iter(file.recipe.domains.values())).data
    source = file.folder / str(data.jsonl)
    if not source.exists():
        pytest.skip(f"{data.jsonl} is not here")
    first = tmp_path / "first.jsonl"
    first.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[:20]), "utf-8")
    (domain,) = file.recipe.domains
    found = check_gold(load_recipe(name, [f"domains.{domain}.data.jsonl={first}"]))
    (facts,) = found.facts
    assert found.problems == []
    assert facts.num_gold == facts.num_right == (0 if name == "ifeval" else 20)
    assert facts.num_wrong >= 20
    assert facts.num_fooled == 0
    assert ("no gold, 0 of 20 wrong ones score 1" in found.text()) == (name == "ifeval")


def test_what_a_constant_scores_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": "yes" if n < 15 else "no"} for n in range(20)]
    assert examined(tmp_path, "exact", rows).best_constant == 0.75


CONVERT = """\
def row(raw):
    if raw["n"] == 3:
        return None
    return {"prompt": f"{raw['n']}?", "response": "yes", "answer": "yes"}

def broken(raw):
    return raw["m"]
"""


def test_a_function_of_the_users_makes_the_rows(tmp_path: Path) -> None:
    (tmp_path / "mine_rows.py").write_text(CONVERT)
    raw = [{"n": n} for n in range(6)]
    text = RECIPE.replace("rows.jsonl}", "rows.jsonl, convert: mine_rows:row}")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("REWARD", "exact"))
    (facts,) = check_gold(load_recipe(str(path))).facts
    assert (facts.num_rows, facts.num_right) == (5, 5)
    path.write_text(path.read_text().replace("mine_rows:row", "mine_rows:broken"))
    with pytest.raises(DataError, match="line 1: mine_rows:broken raised KeyError"):
        check_gold(load_recipe(str(path)))


PROGRAMS = [
    {
        "prompt": f"{n}",
        "response": "def f(x): return x",
        "tests": [{"call": f"f({x})", "expect": str(x)} for x in (1, 2)],
    }
    for n in range(30)
]


def test_the_level_of_the_sandbox_is_told(tmp_path: Path) -> None:
    with Sandbox(lowest="limits") as sandbox:
        level = sandbox.level
    facts = examined(tmp_path, "programs", PROGRAMS, "    reward_options: {sandbox: limits}\n")
    assert facts.sandbox == level
    assert f"the sandbox's level is {level}" in GoldReport([facts]).text()
    assert check_recipe(load_recipe(str(tmp_path / "mine.yaml"))) == {"mine": level}
    nothing_runs = examined(tmp_path, "formats", PROGRAMS, "    reward_options: {min_words: 1}\n")
    assert nothing_runs.sandbox is None
    assert check_recipe(load_recipe(str(tmp_path / "mine.yaml"))) == {}


def test_data_cannot_lower_the_level_that_the_recipe_asks_for(tmp_path: Path) -> None:
    rows = [{**row, "sandbox": "limits"} for row in PROGRAMS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    for level in ("landlock", "namespaces"):
        option = f"programs\n    reward_options: {{sandbox: {level}, timeout_s: 3.0}}"
        path.write_text(RECIPE.replace("REWARD", option))
        file = load_recipe(str(path))
        domain = file.recipe.domains["mine"]
        found = rows_to_check(domain.data, folder=tmp_path, seed=0)
        assert found[0].fields["sandbox"] == "limits"
        given = [domain.reward_fields({**row.fields, "timeout_s": 1.0}) for row in found]
        assert sandbox_levels([("", fields) for fields in given]) == {level}
        assert {fields["timeout_s"] for fields in given} == {1.0}  # other options it may


def test_a_sandbox_that_cannot_be_had_is_known_before_training(tmp_path: Path) -> None:
    rows = PROGRAMS
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    option = "programs\n    reward_options: {sandbox: none}"
    path.write_text(RECIPE.replace("REWARD", option))
    with pytest.raises(PosttrainError, match=r"domains.mine.reward: sandbox 'none' is none of"):
        check_recipe(load_recipe(str(path)))
