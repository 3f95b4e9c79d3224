"""Laws of recipes: what is shipped is valid; a mistake is one line with file, field and remedy."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi, errors
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from posttrain.domains import DataConfig
from posttrain.errors import RecipeError
from posttrain.pipeline.checks import PRESET_CONTEXT, check_recipe, is_known_generator
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.recipe_docs import reference
from posttrain.pipeline.recipe_file import RecipeFile, load_recipe
from posttrain.pipeline.recipe_yaml import read_value
from posttrain.pipeline.shipped import find_recipe, shipped_recipes
from posttrain.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = [path.stem for path in shipped_recipes()]

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


def write_checkpoint(folder: Path) -> Path:
    """What the checks read of one: a tokenizer, a config and weights."""
    build_tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    save_file({"weight": np.zeros(1)}, folder / "model.safetensors")
    return folder


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


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_passes_its_own_checks(name: str) -> None:
    file = load_recipe(name)
    for domain in file.recipe.domains.values():
        if domain.data.jsonl and not (file.folder / domain.data.jsonl).exists():
            pytest.skip(f"{domain.data.jsonl} is not here")
    check_recipe(file)
    assert file.recipe.name == name


def test_quickstart_smoke_and_compare_are_shipped() -> None:
    assert {"quickstart", "smoke", "compare"} <= set(SHIPPED)


def test_a_recipe_of_ones_own_passes_in_a_folder_of_its_own(tmp_path: Path) -> None:
    file = checked(write_recipe(tmp_path))
    assert file.folder == tmp_path
    assert file.recipe.domains["letters"].name == "letters"


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = checked(write_recipe(tmp_path)).recipe
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(again)).recipe == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("no", "no"), ("1e-3", 1e-3), ("5.", 5.0), ("-3", -3), ("true", True),
        ("null", None), ("", None), ("2024-01-01", "2024-01-01"), ("[1, a]", [1, "a"]),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = read_value(text)
    assert read == value
    assert type(read) is type(value)


def test_an_override_changes_one_field_and_nothing_else(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    before = load_recipe(str(path)).recipe.model_dump()
    after = load_recipe(str(path), ["domains.letters.sft.num_steps=7"]).recipe.model_dump()
    assert after["domains"]["letters"]["sft"].pop("num_steps") == 7
    assert before["domains"]["letters"]["sft"].pop("num_steps") == 2
    assert after == before


def test_an_override_can_make_a_section_and_remove_one(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = load_recipe(
        str(path), ["evaluate.samples_per_prompt=2", "domains.letters.sft=null"]
    ).recipe
    assert recipe.evaluate.samples_per_prompt == 2
    assert recipe.domains["letters"].sft is None


def test_an_override_can_add_a_domain_and_a_teacher(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    domain = "domains.digits={data: {jsonl: rows.jsonl}, reward: exact, sft: {num_steps: 4}}"
    recipe = load_recipe(str(path), [domain, "domains.digits.sft.num_steps=5"]).recipe
    assert list(recipe.domains) == ["letters", "digits"]
    assert recipe.domains["digits"].sft is not None
    assert recipe.domains["digits"].sft.num_steps == 5


def test_an_override_reaches_into_lists(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    recipe = load_recipe(str(path), ["base.pretrain.mixture.0.weight=3"]).recipe
    assert recipe.base.pretrain is not None
    assert recipe.base.pretrain.mixture[0].weight == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "did you mean 'seed'?"),
        ("domains.leters.reward=exact", "did you mean 'letters'?"),
        ("domains.letters.grpo.num_step=3", "did you mean 'num_steps'?"),
        ("base.pretrain.mixture.3.weight=1", "no field base.pretrain.mixture.3"),
        ("seed", "write it as field=value"),
        ("seed=[", "no YAML"),
    ],
)
def test_an_override_of_no_field_is_refused(tmp_path: Path, override: str, said: str) -> None:
    message = message_of(write_recipe(tmp_path), override)
    assert override in message
    assert said in message


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "said"),
    [
        ("num_steps: 3", "num_stps: 3", 15, "domains.letters.grpo.num_stps", "mean 'num_steps'?"),
        ("distill:", "destill:", 16, "destill", "did you mean 'distill'?"),
        ("num_steps: 3", "num_steps: many", 15, "domains.letters.grpo.num_steps", "whole number"),
        ("num_steps: 3", "num_steps: -1", 15, "domains.letters.grpo.num_steps", "greater than"),
        ("preset: tiny", "preset: huge", 3, "base.preset", "'tiny' or 'small'"),
        ("preset: tiny", "preset: tiny\n  path: /x", 2, "base", "exactly one of preset, path"),
        ("sft:\n", "sft: 5\n    system:\n", 13, "domains.letters.sft", "a mapping of fields"),
        ("[average]", "[avarage]", 17, "baselines.0", "'average', 'ties' or 'mixed'"),
        ("my_rewards:letters", "{exact: .inf}", 11, "domains.letters.reward.exact", "finite"),
        ("my_rewards:letters", "{exact: big}", 11, "domains.letters.reward.exact", "a number"),
        ("[average]", "[ties, ties]", 17, "baselines", "'ties' is given twice"),
        ("sft:\n", "efforts: [none, none]\n    sft:\n", 13, "domains.letters.efforts", "twice"),
        ("{num_steps: 3}", "{kl_weight: .inf}", 15, "domains.letters.grpo.kl_weight", "finite"),
        ("[average]", "[mixed]", 17, "baselines", "mixed.sft"),
        ("{num_steps: 2}", "{start: avrage}", 16, "distill.start", "base, average, specialist/let"),
        ("  letters:\n", "  macro:\n", 8, "domains.macro", "the report's column of means"),
        ("name: mine", "name: ../mine", 1, "name", "pattern"),
        ("my_rewards:letters", "mathmatics", 11, "domains.letters.reward", "mathematics"),
        ("my_rewards:letters", "my_rewards:lettres", 11, "domains.letters.reward", "lettres"),
        ("my_rewards:letters", "yours:letters", 11, "domains.letters.reward", "yours"),
        ("my_rewards:letters", "[exact]", 11, "domains.letters.reward", "or a mapping of names"),
        ("  letters:\n", "  5:\n", 8, "domains.5", "quote it if it looks like a number"),
        ("num_steps: 2\n", "max_length: 5\n", 14, "domains.letters.sft.max_length", "has 11 tok"),
        ("jsonl: rows.jsonl\n", "jsonl: x.jsonl\n", 10, "domains.letters.data.jsonl", "x.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_file_line_field_and_remedy(
    tmp_path: Path, old: str, new: str, line: int, field: str, said: str
) -> None:
    assert old in RECIPE
    path = write_recipe(tmp_path, RECIPE.replace(old, new, 1))
    message = message_of(path)
    assert message.startswith(f"{path}:{line}: {field}: ")
    assert said in message


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE.replace("    reward: my_rewards:letters\n", ""))
    assert "domains.letters.reward: a required field is missing" in message_of(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "name: yours\n")
    assert message_of(path).startswith(f"{path}:18: name is given twice")


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n", "a: &a [*a]\n", "\0"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = write_recipe(tmp_path, text)
    assert message_of(path).startswith(str(path))


def test_an_unknown_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match=r"quickstart.*did you mean 'quickstart'"):
        find_recipe("quikstart")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{not json", "JSON"),
        ('{"response": "1"}', "prompt"),
        ('{"prompt": 5}', "5"),
    ],
)
def test_a_bad_row_is_named_by_its_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    path = write_recipe(tmp_path)
    data = tmp_path / "other.jsonl"
    data.write_text((tmp_path / "rows.jsonl").read_text() + row + "\n")
    message = message_of(path, f"domains.letters.data.jsonl={data.name}")
    assert message.startswith(f"--set: domains.letters.data.jsonl: {data}, line 65")
    assert said in message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_library\n", "`import my_rewards` raised ModuleNotFoundError"),
        ("letters = 5\n", "'letters' is int, not a function"),
    ],
)
def test_a_reward_module_that_cannot_be_used_is_named(
    tmp_path: Path, source: str, said: str
) -> None:
    path = write_recipe(tmp_path)
    with (tmp_path / "my_rewards.py").open("a") as file:
        file.write(source)
    message = message_of(path)
    assert message.startswith(f"{path}:11: domains.letters.reward: ")
    assert said in message


def test_a_rows_fields_must_leave_room_for_a_tools_arguments(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = [{"prompt": f"say {i}", "response": "1", "name": "x"} for i in range(64)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool = "domains.letters.tools=[{name: get, python: 'my_rewards:letters'}]"
    message = message_of(path, tool, "domains.letters.data.jsonl=named.jsonl")
    assert "domains.letters.data: the row with prompt 'say 0' has a field 'name'" in message


def test_a_mixture_needs_something_to_learn(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "bare.jsonl").write_text('{"prompt": "say 1"}\n' * 9)
    message = message_of(path, "base.pretrain.mixture.0.data.jsonl=bare.jsonl")
    assert "base.pretrain.mixture.0.data.jsonl: " in message
    assert "of its 9 rows 0 have a response" in message


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, num_rows=0)
    assert "rows.jsonl" in message_of(path)


@pytest.mark.parametrize(("task", "is_known"), [("gcd", True), ("chain_sum", True), ("gdc", False)])
def test_a_reasoning_gym_task_is_looked_up_without_its_import(task: str, is_known: bool) -> None:
    assert is_known_generator(DataConfig(reasoning_gym={"task": task})) == is_known


def test_supervised_training_needs_demonstrations(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = [json.dumps({"prompt": f"say {i}", "answer": i}) + "\n" for i in range(64)]
    (tmp_path / "bare.jsonl").write_text("".join(rows))
    message = message_of(path, "domains.letters.data.jsonl=bare.jsonl")
    assert message.startswith(f"{line_of(path, 'sft:')}: domains.letters.sft: ")
    assert "response" in message


def test_a_prompt_must_leave_room_for_its_answer(tmp_path: Path) -> None:
    # the tiny preset reads 4096 byte tokens: BOS, user and assistant marks and </think> are four
    path = write_recipe(tmp_path)
    room = 4096 - 16 - 4
    for length, fits in ((room, True), (room + 1, False)):
        row = json.dumps({"prompt": "x" * length, "response": "1"}) + "\n"
        (tmp_path / "long.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + row)
        if fits:
            checked(path, "domains.letters.data.jsonl=long.jsonl")
        else:
            message = message_of(path, "domains.letters.data.jsonl=long.jsonl")
            assert "4081 tokens" in message
            assert "context of 4096" in message


def test_a_teacher_must_give_every_token_the_same_id(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "teachers: {letters: teacher}\n")
    folder = write_checkpoint(tmp_path / "teacher")
    checked(path)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    message = message_of(path)
    assert message.startswith(f"{line_of(path, 'teachers:')}: teachers.letters: ")
    assert "'a'" in message


def test_a_teacher_may_be_an_adapter_of_a_base_that_is_there(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "teachers: {letters: lora}\n")
    (tmp_path / "lora").mkdir()
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "../elder"}')
    save_file({"lora_A": np.zeros(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    assert "of the base '../elder', which is no checkpoint's folder" in message_of(path)
    write_checkpoint(tmp_path / "elder")
    checked(path)
    config.write_text('{"base_model_name_or_path": null}')
    assert "base_model_name_or_path is None: write a path" in message_of(path)
    config.write_text('{"base_model_name_or_path": "../elder"}')
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"cut")
    message = message_of(path)
    assert message.startswith(f"{line_of(path, 'teachers:')}: teachers.letters: ")
    assert "adapter_model.safetensors holds no whole weights" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "config.json is no JSON"),
        ("config.json", b"{}", "config.json names no model"),
        ("tokenizer.json", b"{", "tokenizer.json is no tokenizer"),
        ("model.safetensors", b"cut", "model.safetensors holds no whole weights"),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = write_recipe(tmp_path)
    folder = write_checkpoint(tmp_path / "teacher")
    (folder / name).write_bytes(content)
    message = message_of(path, "base={path: teacher}")
    assert message.startswith("--set: base.path: ")
    assert said in message


def answer(status: int, code: str = "") -> Any:
    """The hub's, as huggingface_hub reads it."""
    headers = {"X-Error-Code": code} if code else {}
    return httpx.Response(status, headers=headers, request=httpx.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (errors.RepositoryNotFoundError("", response=answer(404)), "the hub has no {kind} 'a/b'"),
        (errors.GatedRepoError("", response=answer(403)), "is gated"),
        (errors.RevisionNotFoundError("", response=answer(404)), "no revision"),
        (errors.HFValidationError("bad"), "is no name on the hub"),
        (httpx.ConnectError("refused"), "was not downloaded before"),
        (None, None),
    ],
)
@pytest.mark.parametrize(
    ("kind", "field", "override"),
    [
        ("model", "base.hub", "base={hub: a/b}"),
        ("dataset", "domains.letters.data.hub", "domains.letters.data={hub: a/b}"),
    ],
)
def test_what_the_hub_cannot_give_is_named_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    field: str,
    override: str,
    given: Exception | None,
    said: str | None,
) -> None:
    def info(self: HfApi, name: str, **_: Any) -> None:
        assert name == "a/b"
        if given:
            raise given

    monkeypatch.setattr(HfApi, f"{kind}_info", info)
    path = write_recipe(tmp_path)
    if said is None:
        checked(path, override)
        return
    message = message_of(path, override)
    assert message.startswith(f"--set: {field}: ")
    assert said.format(kind=kind) in message


def test_what_was_downloaded_before_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(HfApi, "model_info", info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models--a--b" / "snapshots").mkdir(parents=True)
    checked(write_recipe(tmp_path), "base={hub: a/b}")


def test_a_job_cannot_take_gpus_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    path = write_recipe(tmp_path)
    checked(path, "cluster.gpus_per_job=1")
    message = message_of(path, "cluster.gpus_per_job=2")
    assert message.startswith("--set: cluster.gpus_per_job: ")
    assert "finds 1 on this machine" in message


@pytest.mark.parametrize(
    ("field", "value"), [("base", "{path: nowhere}"), ("teachers", "{letters: no}")]
)
def test_a_missing_checkpoint_is_named(tmp_path: Path, field: str, value: str) -> None:
    message = message_of(write_recipe(tmp_path), f"{field}={value}")
    assert "is no folder" in message
    assert field in message


def test_efforts_make_one_specialist_each(tmp_path: Path) -> None:
    recipe = checked(write_recipe(tmp_path), "domains.letters.efforts=[none, high]").recipe
    assert {name: d.effort for name, d in recipe.specialists().items()} == {
        "letters@none": "none",
        "letters@high": "high",
    }


def test_a_domain_is_called_mixed_only_where_no_baseline_is(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE.replace("  letters:\n", "  mixed:\n"))
    checked(path)
    overrides = ("baselines=[mixed]", "mixed.sft={}")
    message = message_of(path, *overrides)
    assert message.startswith(f"{path}:8: domains.mixed: this is the name of the mixed baseline's")
    checked(path, *overrides, "domains.mixed.efforts=[none]")


def test_an_effort_may_have_a_limit_of_its_own(tmp_path: Path) -> None:
    field = "domains.letters.efforts"
    given = f"{field}={{none: {{max_new_tokens: 5}}, 80: {{}}}}"
    recipe = checked(write_recipe(tmp_path), given).recipe
    found = {name: (d.effort, d.max_new_tokens) for name, d in recipe.specialists().items()}
    own = recipe.domains["letters"].max_new_tokens
    assert found == {"letters@none": ("none", 5), "letters@80": (80, own)}
    assert own != 5
    for wrong in ("[101]", "[0]", "[low]", "[2.5]"):
        assert field in message_of(write_recipe(tmp_path), f"{field}={wrong}")


def test_a_mixture_names_domains_without_their_efforts(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    efforts = "domains.letters.efforts=[high]"
    field = "base.pretrain.mixture.0.domain"
    checked(path, efforts, f"{field}=letters")
    message = message_of(path, efforts, f"{field}=letters@high")
    assert f"{field}: 'letters@high' is no domain of this recipe: they are letters" in message


def test_the_json_schema_accepts_what_the_model_accepts() -> None:
    from jsonschema import validate

    for name in SHIPPED:
        recipe = load_recipe(name)
        validate(recipe.source.data, Recipe.model_json_schema())


def test_every_field_is_documented() -> None:
    def undocumented(schema: dict[str, Any], name: str) -> list[str]:
        fields: dict[str, Any] = schema.get("properties", {})
        return [f"{name}.{key}" for key, field in fields.items() if not field.get("description")]

    schema = TypeAdapter(Recipe).json_schema()
    models = {"Recipe": schema, **schema["$defs"]}
    assert [field for name, model in models.items() for field in undocumented(model, name)] == []


def test_the_reference_page_is_in_step_with_the_models() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == reference(), "run `posttrain schema --markdown > docs/recipes.md`"


def test_presets_have_the_context_that_prompts_are_checked_against() -> None:
    from posttrain.backbone.presets import PRESETS

    assert {name: p["max_position_embeddings"] for name, p in PRESETS.items()} == PRESET_CONTEXT


@pytest.mark.parametrize(
    ("ablations", "words"),
    [
        ("{short: {num_stepz: 1}}", "ablations.short.num_stepz: as a field of distill: Extra"),
        ("{short: {num_steps: 0}}", "ablations.short.num_steps: as a field of distill: Input"),
        ("{short: {start: average/}}", "ablations.short.start: 'average/' is no stage here"),
        ("{a/b: {}}", "ablations.a/b: this names folders"),
    ],
)
def test_a_mistake_in_an_ablation_is_named(tmp_path: Path, ablations: str, words: str) -> None:
    text = f"{RECIPE}ablations: {ablations}\n"
    assert words in message_of(write_recipe(tmp_path, text))
