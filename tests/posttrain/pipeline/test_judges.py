"""A recipe's judges: what is refused before any compute, and which stages they stand under."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from judge_models import always_says, saved
from own_recipe import checked, message_of, write_recipe

from posttrain.errors import RecipeError
from posttrain.pipeline import source
from posttrain.pipeline.costs import BYTES_PER_PARAMETER, num_judge_parameters
from posttrain.pipeline.evaluation import evaluate_on
from posttrain.pipeline.gold import check_gold
from posttrain.pipeline.plan import plan
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.recipe_file import load_recipe
from posttrain.pipeline.stages import build, stage_keys

RECIPE = """\
name: mine
base: {path: base}
domains:
  letters:
    data: {jsonl: rows.jsonl}
    reward: {judge: 1.0, exact: 0.5}
    judge: {checkpoint: judge, rubric: answer}
    max_new_tokens: 16
    grpo: {num_steps: 3, prompts_per_step: 2, samples_per_prompt: 2}
evaluate: {num_prompts: 2, samples_per_prompt: 1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for name in ("base", "judge"):
        saved(always_says("Score: 3"), tmp_path / name)
    return write_recipe(tmp_path, RECIPE)


def test_a_recipe_with_a_judge_passes(path: Path) -> None:
    checked(path)
    checked(path, "domains.letters.judge.checkpoint=actor")
    checked(path, "domains.letters.judge.reference=response", "domains.letters.judge.pairs=true")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward=exact", "reward 'exact' asks nobody: name judge in reward"),
        ("judge=null", "add the section judge"),
        ("judge.checkpoint=nowhere", r"nowhere is no folder"),
        ("judge.votes=0", "greater than or equal to 1"),
        ("judge.pairs=true", "name the row's field in reference"),
        ("judge.high=1", "low is 1 and high 1"),
        ("judge={checkpoint: judge, votes: 2, temperature: 0}", "all of them would be the same"),
        ("judge.rubric=marks", r"row 1 of 64: .*'say 0' has None in the field 'marks'"),
        ("judge={checkpoint: judge, rubric: answer, reference: gold}", "in the field 'gold'"),
        ("judge.max_new_tokens=3700", r"row 1 of 64: .*context of 4096"),
        ("judge.checkpoint=specialist/other", "'other' is no specialist of this recipe: letters"),
        ("judge.checkpoint=specialist/letters", "'letters' is judged by a specialist itself"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_in_a_line(path: Path, override: str, said: str) -> None:
    assert re.search(said, message_of(path, f"domains.letters.{override}"))


def test_the_row_without_a_rubric_is_named(path: Path) -> None:
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    rows[40]["answer"] = ""
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = "domains.letters.reward=judge"
    assert "row 41 of 64: the row with prompt 'say 40' has ''" in message_of(path, judge)
    checked(
        path, judge, "domains.letters.judge.rubric=r", "domains.letters.reward_options.r=Be kind."
    )


def test_a_row_too_long_for_its_judge_is_named(path: Path) -> None:
    rows = [json.loads(line) for line in (path.parent / "rows.jsonl").read_text().splitlines()]
    rows[7]["answer"] = "be kind " * 500
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "row 8 of 64: its judge is asked in 4" in message_of(path)


def keys(path: Path, *overrides: str) -> dict[str, str]:
    source._digest.cache_clear()
    file = load_recipe(str(path), overrides)
    return stage_keys(build(file.recipe, file.folder), file.folder, file.recipe.seed)


def test_another_judge_reruns_what_it_judged(path: Path) -> None:
    before = keys(path)
    saved(always_says("Score: 4"), path.parent / "judge")
    after = keys(path)
    reran = {name for name in before if before[name] != after[name]}
    assert reran == {n for n in before if n != "base"}
    votes = keys(path, "domains.letters.judge.votes=2")
    assert {n for n in after if after[n] != votes[n]} == reran


def stages(path: Path, *overrides: str) -> dict[str, Any]:
    file = load_recipe(str(path), overrides)
    return {stage.name: stage for stage in build(file.recipe, file.folder)}


def test_an_actor_judges_its_own_training_and_the_base_judges_evaluations(path: Path) -> None:
    found = stages(path, "domains.letters.judge.checkpoint=actor")
    assert found["grpo/letters"].inputs == {"start": "base"}
    assert found["evaluate/specialist/letters"].inputs == {
        "checkpoint": "grpo/letters",
        "judge/letters": "base",
    }


TWO = RECIPE.replace(
    "evaluate:",
    """\
  judging:
    data: {jsonl: rows.jsonl}
    reward: exact
    sft: {num_steps: 2}
evaluate:""",
)


def test_a_specialist_that_judges_is_made_first(path: Path) -> None:
    path.write_text(TWO.replace("checkpoint: judge", "checkpoint: specialist/judging"))
    found = stages(path)
    assert found["grpo/letters"].inputs == {"start": "base", "judge/letters": "sft/judging"}
    assert found["evaluate/base"].inputs["judge/letters"] == "sft/judging"
    names = list(found)
    assert names.index("sft/judging") < names.index("grpo/letters")
    checked(path)


def test_training_that_grades_nothing_does_not_depend_on_the_judge(path: Path) -> None:
    path.write_text(RECIPE.replace("    grpo:", "    sft: {num_steps: 2}\n    grpo:"))
    before = keys(path)
    after = keys(path, "domains.letters.judge.votes=3")
    assert before["sft/letters"] == after["sft/letters"]
    assert before["grpo/letters"] != after["grpo/letters"]


def test_a_judge_costs_what_it_reads_and_says(path: Path, tmp_path: Path) -> None:
    def tokens(*overrides: str) -> int:
        file = load_recipe(str(path), overrides)
        found = plan(file.recipe, file.folder, tmp_path / "run").stages
        return next(stage.tokens for stage in found if stage.name == "grpo/letters")

    more = tokens("domains.letters.judge.votes=3") - tokens()
    assert more == 3 * 4 * 2 * 128  # steps, answers, votes more, half of 256 tokens each


def test_gold_answers_are_not_put_to_a_judge(path: Path) -> None:
    report = check_gold(load_recipe(str(path)))
    assert [fact.reward for fact in report.facts] == ["exact", "judge"]
    assert report.json()[1]["num_gold"] == report.json()[1]["num_wrong"] == 0
    assert "letters: reward judge, 64 rows: a model's verdict, not checked" in report.text()
    only = check_gold(load_recipe(str(path), ["domains.letters.reward=judge"]))
    assert [fact.reward for fact in only.facts] == ["judge"]
    assert only.problems == []


def test_a_judge_that_is_trained_is_checked_by_its_gold_verdicts(path: Path) -> None:
    rows = [
        {"prompt": f"p{i}", "rubric": "r", "answer": f"a{i}", "gold_verdict": 1 + i % 10}
        for i in range(40)
    ]
    (path.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(
        RECIPE.replace("{judge: 1.0, exact: 0.5}", "verdicts")
        .replace("    judge: {checkpoint: judge, rubric: answer}\n", "")
        .replace("rows.jsonl}", 'rows.jsonl, convert: "posttrain.judge_prompts:judging_row"}')
    )
    (facts,) = check_gold(checked(path)).facts
    assert (facts.num_right, facts.num_gold, facts.num_fooled) == (40, 40, 0)
    assert facts.best_constant == 0.1
    assert facts.problems == []


def test_a_checkpoint_is_evaluated_by_the_base_where_the_actor_judges(path: Path) -> None:
    file = load_recipe(str(path), ["domains.letters.judge.checkpoint=actor"])
    found = evaluate_on(file, path.parent / "judge")
    assert found.domains["letters"].score == pytest.approx(2 / 9)  # 3 of 1 to 10, and no exact one
    preset = "base={preset: tiny, pretrain: {mixture: [{data: {jsonl: rows.jsonl}}]}}"
    file = load_recipe(str(path), ["domains.letters.judge.checkpoint=actor", preset])
    with pytest.raises(RecipeError, match=r"judge\.checkpoint: 'actor' is no folder"):
        evaluate_on(file, path.parent / "nothing is loaded")
    path.write_text(TWO.replace("checkpoint: judge", "checkpoint: specialist/judging"))
    with pytest.raises(RecipeError, match="'specialist/judging' is no folder"):
        evaluate_on(load_recipe(str(path)), path.parent / "nothing is loaded")


def test_a_judges_weights_are_counted(path: Path) -> None:
    def weights(*overrides: str) -> float:
        file = load_recipe(str(path), overrides)
        stages = build(file.recipe, file.folder)
        return num_judge_parameters(file.recipe, stages, file.folder) * BYTES_PER_PARAMETER

    (path.parent / "judge" / "more.safetensors").write_bytes(bytes(1000))
    sizes = {n: (path.parent / n / "model.safetensors").stat().st_size for n in ("base", "judge")}
    assert weights() == sizes["judge"] + 1000
    assert weights("domains.letters.judge.checkpoint=actor") == sizes["base"]
    assert weights("domains.letters.judge=null", "domains.letters.reward=exact") == 0


def test_a_recipe_says_its_judge_again_when_it_is_written(path: Path) -> None:
    recipe = load_recipe(str(path)).recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
