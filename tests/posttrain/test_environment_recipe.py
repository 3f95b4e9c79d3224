"""The shipped recipe of a world that keeps its state: rows, prompts, grader and limit."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from posttrain.domains import DataConfig, DomainSpec
from posttrain.generated import store
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.gold import check_gold
from posttrain.pipeline.recipe_file import load_recipe
from posttrain.tasks import Task
from posttrain.tokenizer import build_tokenizer
from rewards.environments import replay


def test_the_store_says_what_right_demonstrations_say_and_ends_where_it_is_to_end() -> None:
    for row in store.problems(size=200, seed=1):
        turns = row["demonstration"]
        calls = [call for turn in turns for call in turn.get("tool_calls", ())]
        found = replay(row["environment"], calls)
        assert found.results == [turn["content"] for turn in turns if turn["role"] == "tool"]
        assert found.state == row["state"]
        old, new = row["prompt"].split(">")
        start = row["environment"]["start"]
        assert row["state"] == {**{k: v for k, v in start.items() if k != old}, new: start[old]}


def test_what_is_to_be_set_has_to_be_read_first() -> None:
    rows = list(store.problems(size=300, seed=2))
    values = [row["environment"]["start"][row["prompt"][:2]] for row in rows]
    assert max(map(values.count, values)) < 20  # no guess is worth much
    assert not any(value in row["prompt"] for row, value in zip(rows, values, strict=True))


def spec_of(**changes: Any) -> DomainSpec:
    data = DataConfig(python="posttrain.generated.store:problems", args={"size": 40})
    fields = {"name": "store", "data": data, "reward": "tools", "environment": "store"}
    return DomainSpec.model_validate({**fields, **changes})


@pytest.mark.parametrize("is_told", [True, False])
def test_a_world_is_introduced_only_where_the_recipe_says_so_and_answers_in_any_case(
    tmp_path: Path, is_told: bool
) -> None:
    tokenizer = build_tokenizer()
    end_of_turn: Any = tokenizer.eos_token_id
    with closing(
        Task(spec_of(environment_in_prompt=is_told), tokenizer, folder=tmp_path, seed=0)
    ) as task:
        row = task.train[0]
        (request,) = task.requests([row])
        assert ('"name": "set"' in tokenizer.decode(request.prompt)) == is_told
        assert (len(request.prompt) > 1000) == is_told
        ids, own = task.demonstrations([row])[0]
        assert ids[: len(request.prompt)] == request.prompt
        assert request.continue_turn is not None
        end = ids.index(end_of_turn, len(request.prompt)) + 1
        said = request.continue_turn(ids[len(request.prompt) : end])
        assert isinstance(said, list)
        assert said == ids[end : end + len(said)]  # as it was demonstrated
        assert not any(own[end : end + len(said)])


def test_the_recipe_passes_its_checks_and_its_grader_tells_right_from_wrong() -> None:
    file = load_recipe("environment", ["domains.store.data.args.size=200"])
    assert check_recipe(file) == {}
    (facts,) = check_gold(file).facts
    assert facts.problems == []
    assert (facts.num_gold, facts.num_right, facts.num_fooled) == (200, 200, 0)


def test_the_recipes_limit_leaves_room_for_a_right_answer_of_several_turns() -> None:
    file = load_recipe("environment")
    domain = file.recipe.domains["store"]
    tokenizer = build_tokenizer()
    end_of_turn: Any = tokenizer.eos_token_id
    with closing(
        Task(spec_of(environment_in_prompt=False), tokenizer, folder=file.folder, seed=0)
    ) as task:
        for row in task.train:
            (request,) = task.requests([row])
            ids, _ = task.demonstrations([row])[0]
            assert len(ids) - len(request.prompt) < domain.max_new_tokens
            assert ids.count(end_of_turn) == 3  # turns
