"""A recipe's stages, and what a change in it reruns: what depends on it, and nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.errors import InsufficientResources
from posttrain.pipeline import source
from posttrain.pipeline.plan import plan, wanted_workers
from posttrain.pipeline.recipe import ClusterConfig, Recipe
from posttrain.pipeline.stages import Stage, build, stage_keys
from posttrain.report_config import ReportStage
from specialists.config import GrpoStage, SftStage

TRAINED = {
    "sft": {"num_steps": 10, "rows_per_step": 8},
    "grpo": {"num_steps": 20, "prompts_per_step": 4, "samples_per_prompt": 4},
}
CONTENT: dict[str, Any] = {
    "name": "two",
    "base": {
        "preset": "tiny",
        "pretrain": {"num_steps": 10, "mixture": [{"data": {"jsonl": "web.jsonl"}}]},
    },
    "domains": {
        "sums": {"data": {"jsonl": "sums.jsonl"}, "reward": "exact", **TRAINED},
        "words": {"data": {"jsonl": "words.jsonl"}, "reward": "my_rewards:score", **TRAINED},
    },
    "distill": {"num_steps": 5, "prompts_per_step": 16},
    "baselines": ["average", "ties"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("web", "sums", "words"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "my_rewards.py").write_text("def score(response, **row):\n    return 1.0\n")
    return tmp_path


def keys(folder: Path, content: dict[str, Any]) -> dict[str, str]:
    source._digest.cache_clear()  # files are read once a process; these change
    recipe = Recipe.model_validate(content)
    return stage_keys(build(recipe, folder), folder, recipe.seed)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def with_field(path: str, value: object) -> dict[str, Any]:
    content = json.loads(json.dumps(CONTENT))  # the two domains share no table, as YAML's would
    *above, last = path.split(".")
    table = content
    for name in above:
        table = table[name]
    table[last] = value
    return content


def stages_of(content: dict[str, Any], folder: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in build(Recipe.model_validate(content), folder)}


MERGED = {"average", "ties", "opd"}
EVALUATED = {f"evaluate/{name}" for name in MERGED} | {"report"} | MERGED


def test_the_stages_stand_in_order_and_on_their_inputs(folder: Path) -> None:
    stages = stages_of(CONTENT, folder)
    assert list(stages) == [
        *("base", "sft/sums", "grpo/sums", "sft/words", "grpo/words", "average", "ties", "opd"),
        *("evaluate/base", "evaluate/sft/sums", "evaluate/specialist/sums"),
        *("evaluate/sft/words", "evaluate/specialist/words"),
        *("evaluate/average", "evaluate/ties", "evaluate/opd", "report"),
    ]
    assert stages["grpo/sums"].inputs == {"start": "sft/sums"}
    specialists = {"specialist/sums": "grpo/sums", "specialist/words": "grpo/words"}
    assert stages["ties"].inputs == {"base": "base", **specialists}
    assert stages["opd"].inputs == {"base": "base", **specialists}
    assert stages["evaluate/specialist/sums"].inputs == {"checkpoint": "grpo/sums"}
    assert stages["report"].inputs["metrics/grpo/sums"] == "grpo/sums"
    assert stages["report"].inputs["evaluate/opd"] == "evaluate/opd"
    before: set[str] = set()
    for stage in stages.values():
        assert before.issuperset(stage.inputs.values())
        before.add(stage.name)


def test_a_specialists_own_answers_are_learned_last_and_by_whom_is_asked(folder: Path) -> None:
    content = with_field("domains.sums.best_of", {"num_steps": 3})
    stages = stages_of(content, folder)
    assert stages["best_of/sums"].inputs == {"start": "base", "sampler": "grpo/sums"}
    assert stages["evaluate/grpo/sums"].inputs == {"checkpoint": "grpo/sums"}
    assert stages["evaluate/specialist/sums"].inputs == {"checkpoint": "best_of/sums"}
    assert stages["opd"].inputs["specialist/sums"] == "best_of/sums"
    content["domains"]["sums"]["best_of"]["start"] = "specialist"
    inputs = stages_of(content, folder)["best_of/sums"].inputs
    assert inputs == {"start": "grpo/sums", "sampler": "grpo/sums"}
    for name in ("sft", "grpo"):
        del content["domains"]["sums"][name]
    stages = stages_of(content, folder)
    assert stages["best_of/sums"].inputs == {"start": "base", "sampler": "base"}
    assert "evaluate/grpo/sums" not in stages


def test_a_reward_decides_what_sft_makes_only_where_it_grades(folder: Path) -> None:
    def keys_with(sft: dict[str, Any], reward: str) -> str:
        content = with_field("domains.sums.reward", reward)
        content["domains"]["sums"]["sft"] |= sft
        return keys(folder, content)["sft/sums"]

    assert keys_with({}, "exact") == keys_with({}, "mathematics")
    graded = {"validation_share": 0.2, "score": {}}
    assert keys_with(graded, "exact") != keys_with(graded, "mathematics")


def test_stages_that_train_one_adapter_have_one_lora() -> None:
    content = with_field("domains.sums.sft.lora", {"rank": 2})
    content["domains"]["sums"]["grpo"]["lora"] = {"rank": 2}
    Recipe.model_validate(content)
    content["domains"]["sums"]["best_of"] = {"lora": {"rank": 3}}  # the base learns it afresh
    Recipe.model_validate(content)
    content["domains"]["sums"]["best_of"]["start"] = "specialist"
    with pytest.raises(ValidationError, match="best_of trains the adapter of grpo further"):
        Recipe.model_validate(content)


def test_the_same_recipe_has_the_same_keys(folder: Path) -> None:
    assert keys(folder, CONTENT) == keys(folder, copy.deepcopy(CONTENT))


@pytest.mark.parametrize(
    ("field", "value", "reruns"),
    [
        ("name", "other", {"report"}),
        (
            "domains.sums.grpo.num_steps",
            21,
            {"grpo/sums", "evaluate/specialist/sums"} | EVALUATED,
        ),
        (
            "domains.sums.sft.optimizer",
            {"learning_rate": 1e-5},
            {"sft/sums", "grpo/sums", "evaluate/sft/sums", "evaluate/specialist/sums"} | EVALUATED,
        ),
        ("distill.num_steps", 6, {"opd", "evaluate/opd", "report"}),
        (
            "merges",
            {"ties": {"method": "ties", "density": 0.5}},
            {"ties", "evaluate/ties", "report"},
        ),
    ],
)
def test_a_changed_field_reruns_what_stands_on_it(
    folder: Path, field: str, value: object, reruns: set[str]
) -> None:
    before = keys(folder, CONTENT)
    assert changed(before, keys(folder, with_field(field, value))) == reruns


@pytest.mark.parametrize(
    "field", ["evaluate.num_prompts", "seed", "base.pretrain.num_steps", "cluster.num_threads"]
)
def test_what_concerns_every_checkpoint_reruns_every_evaluation(folder: Path, field: str) -> None:
    content = copy.deepcopy(CONTENT) | {"evaluate": {}, "cluster": {}}
    before = keys(folder, content)
    table = content
    for name in field.split(".")[:-1]:
        table = table[name]
    table[field.split(".")[-1]] = 3
    moved = changed(before, keys(folder, content))
    assert {name for name in before if name.startswith("evaluate/")} <= moved
    assert ("base" in moved) == (field != "evaluate.num_prompts")


def test_data_is_part_of_the_key_by_content(folder: Path) -> None:
    before = keys(folder, CONTENT)
    (folder / "web.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n')
    assert changed(before, keys(folder, CONTENT)) == set(before)


def test_a_users_reward_is_part_of_the_key_of_its_domains_stages(folder: Path) -> None:
    before = keys(folder, CONTENT)
    (folder / "my_rewards.py").write_text("def score(response, **row):\n    return 0.5\n")
    moved = changed(before, keys(folder, CONTENT))
    assert {"grpo/words", "evaluate/base", "opd"} <= moved
    assert not {"base", "sft/sums", "sft/words", "grpo/sums"} & moved


@pytest.mark.parametrize(("field", "value"), [("reward", "tools"), ("reward_timeout_s", 9.0)])
def test_a_reward_decides_nothing_where_nothing_is_graded(
    folder: Path, field: str, value: object
) -> None:
    content = copy.deepcopy(CONTENT)
    del content["domains"]["sums"]["grpo"], content["domains"]["words"]["grpo"]
    before = keys(folder, content)
    content["domains"]["sums"] = {**content["domains"]["sums"], field: value}
    moved = changed(before, keys(folder, content))
    assert moved == {name for name in before if name.startswith("evaluate/")} | {"report"}


def test_a_reward_decides_the_opd_that_is_scored_while_it_runs(folder: Path) -> None:
    content = with_field("distill.evaluate_every", 5)
    del content["domains"]["sums"]["grpo"], content["domains"]["words"]["grpo"]
    before = keys(folder, content)
    content["domains"]["sums"]["reward_timeout_s"] = 9.0
    assert "opd" in changed(before, keys(folder, content))


def test_the_length_of_answers_decides_what_opd_samples(folder: Path) -> None:
    moved = changed(
        keys(folder, CONTENT), keys(folder, with_field("domains.sums.max_new_tokens", 9))
    )
    assert {"opd", "grpo/sums"} <= moved
    assert not {"base", "sft/words", "grpo/words"} & moved


def test_a_domain_may_lack_stages_and_have_a_teacher_from_elsewhere(folder: Path) -> None:
    (folder / "teacher").mkdir()
    (folder / "teacher" / "model.safetensors").write_bytes(b"1")
    content = copy.deepcopy(CONTENT)
    del content["domains"]["sums"]["grpo"], content["domains"]["words"]["sft"]
    del content["domains"]["words"]["grpo"]
    content["teachers"] = {"words": "teacher"}
    stages = stages_of(content, folder)
    assert stages["opd"].inputs == {
        "base": "base",
        "specialist/sums": "sft/sums",
        "teacher/words": "teacher/words",
    }
    assert stages["ties"].inputs == {"base": "base", "specialist/sums": "sft/sums"}
    assert stages["report"].config.model_dump()["oracle"] == {"words": "teacher/words"}
    before = keys(folder, content)
    (folder / "teacher" / "model.safetensors").write_bytes(b"2")
    moved = changed(before, keys(folder, content))
    assert {"teacher/words", "opd"} <= moved
    assert not {"base", "sft/sums", "ties"} & moved


def test_a_teacher_that_is_an_adapter_stands_on_its_base(folder: Path) -> None:
    for name, content in (("lora/adapter_model", b"1"), ("elder/model", b"2")):
        (folder / name).parent.mkdir()
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "elder" / "config.json").write_text("{}")
    content = {**copy.deepcopy(CONTENT), "teachers": {"words": "lora"}}
    config = folder / "lora" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "../elder"}')
    assert stages_of(content, folder)["teacher/words"].inputs == {}
    before = keys(folder, content)
    (folder / "elder" / "model.safetensors").write_bytes(b"3")
    moved = changed(before, keys(folder, content))
    assert {"teacher/words", "opd"} <= moved
    assert not {"base", "grpo/words"} & moved
    content["base"] = {"hub": "someone/a-base"}
    config.write_text('{"base_model_name_or_path": "someone/a-base"}')
    assert stages_of(content, folder)["teacher/words"].inputs == {"base": "base"}


def test_a_domain_may_have_several_teachers(folder: Path) -> None:
    (folder / "elder").mkdir()
    (folder / "elder" / "model.safetensors").write_bytes(b"1")
    mixture = {"specialist/words": 1, "elder": 3, "base": 0.5}
    content = {**copy.deepcopy(CONTENT), "teachers": {"words": mixture}}
    stages = stages_of(content, folder)
    assert stages["opd"].config.model_dump()["teachers"] == {
        "words": {"specialist/words": 1, "teacher/words.2": 3, "base": 0.5},
        "sums": "specialist/sums",
    }
    assert stages["opd"].inputs["teacher/words.2"] == "teacher/words.2"
    assert "evaluate/teacher/words.2" in stages
    assert stages["report"].config.model_dump()["oracle"] == {"words": "teacher/words.2"}
    for wrong, found in (({"specialist/nobody": 1}, "no specialist"), ({"base": 0}, "above 0")):
        with pytest.raises(ValidationError, match=found):
            stages_of({**content, "teachers": {"words": wrong}}, folder)


def test_the_report_compares_as_the_recipe_says(folder: Path) -> None:
    content = {**CONTENT, "evaluate": {"num_resamples": 500, "seed": 7}}
    config = stages_of(content, folder)["report"].config
    assert isinstance(config, ReportStage)
    assert (config.num_resamples, config.seed) == (500, 7)


def test_efforts_are_specialists_of_their_own(folder: Path) -> None:
    stages = stages_of(with_field("domains.sums.efforts", ["none", "high"]), folder)
    assert {"sft/sums@none", "grpo/sums@high", "evaluate/specialist/sums@high"} <= stages.keys()
    config = stages["grpo/sums@high"].config
    assert isinstance(config, GrpoStage)
    assert config.domains[0].effort == "high"


def test_mixed_training_gets_as_many_rows_as_specialists_and_opd_together(folder: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["baselines"] = ["mixed"]
    content["mixed"] = {
        "sft": {"num_steps": 1, "rows_per_step": 16},
        "grpo": {"num_steps": 1, "prompts_per_step": 10, "samples_per_prompt": 4},
    }
    stages = stages_of(content, folder)
    sft, grpo = stages["sft/mixed"].config, stages["grpo/mixed"].config
    assert isinstance(sft, SftStage)
    assert isinstance(grpo, GrpoStage)
    assert sft.sft.num_steps == 10  # 2 x 10 x 8 rows in steps of 16
    assert grpo.grpo.num_steps == 18  # 2 x 20 x 16 + 5 x 16 = 720 rollouts in steps of 40
    assert [spec.name for spec in grpo.domains] == ["sums", "words"]
    assert stages["evaluate/mixed"].inputs == {"checkpoint": "grpo/mixed"}


def test_an_existing_base_is_known_by_its_content(folder: Path) -> None:
    (folder / "base").mkdir()
    weights = folder / "base" / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))  # above the size that is read whole
    content = {**CONTENT, "base": {"path": "base"}}
    before = keys(folder, content)
    assert before == keys(folder, content)
    weights.write_bytes(bytes((5 << 20) - 1) + b"1")
    assert changed(before, keys(folder, content)) == set(before)


def test_answers_that_sft_grades_or_learns_are_counted(folder: Path, tmp_path: Path) -> None:
    content = with_field("domains.sums.best_of", {"num_steps": 2, "rows_per_step": 4})
    content["domains"]["sums"]["best_of"] |= {"num_prompts": 10, "samples_per_prompt": 3}
    score = {"validation_share": 0.5, "validate_every": 4, "score": {"num_prompts": 7}}
    content["domains"]["sums"]["sft"] |= score
    found = {s.name: s for s in plan(Recipe.model_validate(content), folder, tmp_path / "r").stages}
    # 10 steps x 8 rows of 80 tokens; after 4, 8 and 10 steps 7 answers of 32
    assert found["sft/sums"].tokens == 10 * 8 * 80 + 3 * 7 * 32
    assert found["best_of/sums"].tokens == 2 * 4 * 80 + 10 * 3 * 32


def test_a_plan_knows_what_is_done_and_sums_up(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(CONTENT)
    directory = tmp_path / "run"
    found = plan(recipe, folder, directory)
    assert {stage.state for stage in found.stages} == {"to do"}
    assert found.wall_s > 0
    grpo = next(stage for stage in found.stages if stage.name == "grpo/sums")
    # 20 steps x 16 answers, of 32 tokens sampled and 80 learned each
    assert grpo.tokens == 20 * 16 * (32 + 80)
    assert not directory.exists()

    name, key = "base", keys(folder, CONTENT)["base"]
    place = directory / "stages" / f"{name}-{key[:12]}"
    place.mkdir(parents=True)
    record = {"stage": name, "key": key, "config": {}, "inputs": {}, "output": ""}
    (place / "done.json").write_text(json.dumps({**record, "seconds": 61.0, "versions": {}}))
    later = plan(recipe, folder, directory)
    assert [stage.name for stage in later.stages if stage.state == "done"] == ["base"]
    assert later.stages[0].seconds == 61
    assert f"{len(later.stages) - 1} of {len(later.stages)} stages to do" in later.text()
    assert later.json()["stages"][0]["state"] == "done"


def test_an_ablation_is_a_distillation_with_some_fields_changed(folder: Path) -> None:
    ablations = {"long": {"num_steps": 9, "optimizer": {"learning_rate": 1.0}}, "same": {}}
    below = {**CONTENT["distill"], "optimizer": {"name": "adamw", "learning_rate": 0.5}}
    content = {**CONTENT, "distill": below, "ablations": ablations}
    found = stages_of(content, folder)
    plain, long = found["opd"], found["opd/long"]
    wanted = plain.config.model_dump()
    wanted["distill"]["num_steps"] = 9
    wanted["distill"]["optimizer"]["learning_rate"] = 1.0
    assert long.config.model_dump() == wanted
    assert long.inputs == plain.inputs
    assert found["evaluate/opd/long"].inputs == {"checkpoint": "opd/long"}
    keyed = keys(folder, content)
    assert keyed["opd/same"] == keyed["opd"] != keyed["opd/long"]
    without = keys(folder, {**content, "ablations": {}})
    assert all(keyed[name] == key for name, key in without.items() if name != "report")


def test_an_ablation_that_starts_from_the_average_makes_it(folder: Path) -> None:
    content = {**CONTENT, "baselines": [], "ablations": {"late": {"start": "average"}}}
    assert stages_of(content, folder)["opd/late"].inputs["average"] == "average"


def test_each_role_of_a_distillation_may_have_a_process(folder: Path) -> None:
    distill = {"num_teacher_workers": 2, "num_rollout_workers": 3, "learners": {"num_ranks": 4}}
    stages = stages_of({**CONTENT, "distill": distill}, folder)
    assert stages["opd"].num_helpers == 2 + 3 + (4 - 1)  # the first rank is in the stage's own


@pytest.mark.parametrize(
    ("distill", "needed", "words"),
    [
        ({"learners": {"num_ranks": 3}}, 3, r"distill\.learners\.num_ranks"),
        ({"max_staleness": 1, "teacher_dtype": "bfloat16"}, 2, "teacher_dtype bfloat16"),
    ],
)
def test_too_few_workers_for_a_stage_to_come_are_told_before_any_runs(
    folder: Path, distill: dict[str, Any], needed: int, words: str
) -> None:
    def content(num_workers: int) -> dict[str, Any]:
        return {**CONTENT, "distill": distill, "cluster": {"num_workers": num_workers}}

    few, enough = (Recipe.model_validate(content(n)) for n in (needed - 1, needed))
    told = f"opd needs {needed} workers for .*{words}.* the run has {needed - 1}: raise cluster"
    with pytest.raises(InsufficientResources, match=told):
        plan(few, folder, folder / "run")
    assert plan(enough, folder, folder / "run").num_workers == needed
    stages = build(few, folder)  # what is done needs nobody
    assert wanted_workers(few.cluster, stages, {"evaluate/opd"}) == 1
    elsewhere = ClusterConfig.model_validate({"address": "10.0.0.1:6379"})
    assert wanted_workers(elsewhere, stages, {"opd"}) >= needed
