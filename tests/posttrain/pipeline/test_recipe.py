"""Laws of recipes: what is shipped is valid; a mistake is one line with file, field and remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from own_recipe import RECIPE, checked, message_of, write_recipe
from pydantic import TypeAdapter

from posttrain.errors import RecipeError
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.recipe_docs import reference
from posttrain.pipeline.recipe_file import load_recipe
from posttrain.pipeline.recipe_yaml import read_value
from posttrain.pipeline.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = [path.stem for path in shipped_recipes()]


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
