"""Laws of a recipe's data, rewards and room: what is wrong beyond types is named before compute."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from own_recipe import checked, line_of, message_of, write_recipe

from posttrain.domains import DataConfig
from posttrain.pipeline.checks import PRESET_CONTEXT, is_known_generator


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


@pytest.mark.parametrize(
    ("reward", "field", "rest"),
    [
        ("mathematics", "answer", {}),
        ("exact", "answer", {"answer": ""}),
        ("puzzles", "answer", {}),
        ("{mathematics: 1, 'my_rewards:letters': 0.2}", "answer", {}),
        ("programs", "tests", {}),
        ("instructions", "kwargs", {"instruction_id_list": []}),
        ("verdicts", "gold_verdict", {"answer": "7"}),
        ("tools", "answer or calls or state or solution", {"call": {"name": "get"}}),
        ("formats", "thinks or language", {"answer": "1"}),
    ],
)
def test_a_row_without_what_its_reward_reads_is_named_with_the_field(
    tmp_path: Path, reward: str, field: str, rest: dict[str, Any]
) -> None:
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"say {i}", "response": "1", "answer": "1", "gold_verdict": 7, "thinks": True,
            "tests": [{"x": 1, "expect": 2}], "instruction_id_list": [], "kwargs": [],
        }
        for i in range(64)
    ]  # fmt: skip
    rows[40] = {"prompt": "say forty", **rest}
    path = write_recipe(tmp_path)
    data = tmp_path / "graded.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"domains.letters.reward={reward}", f"domains.letters.data.jsonl={data.name}")
    message = message_of(path, *given)
    assert message.startswith(f"--set: domains.letters.data.jsonl: {data}, row 41, 'say forty', ")
    assert f"lacks {field}" in message
    checked(path, *given, "domains.letters.bad_gold=1")
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[40]]))
    message_of(path, *given, "domains.letters.bad_gold=1")
    checked(path, *given, "domains.letters.bad_gold=all")


def test_what_rewards_read_may_be_the_recipes_own_option(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    message_of(path, "domains.letters.reward=formats")
    checked(path, "domains.letters.reward=formats", "domains.letters.reward_options={min_words: 2}")


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


def test_of_streamed_rows_the_first_thousand_are_looked_at(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    many = [json.dumps({**row, "prompt": f"say {i}"}) for i in range(1001)]
    for place, is_seen in ((999, True), (1000, False)):
        lines = [*many[:place], "no JSON", *many[place + 1 :]]
        (tmp_path / "stream.jsonl").write_text("\n".join(lines))
        data = "domains.letters.data={jsonl: stream.jsonl, streaming: true}"
        if is_seen:
            assert "line 1000: found 'no JSON'" in message_of(path, data)
        else:
            checked(path, data)


def test_a_role_that_the_bases_tokenizer_cannot_say_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    reminder = {"role": "latest_reminder", "content": "2026"}
    row = {"messages": [reminder, {"role": "user", "content": "say"}], "response": "1"}
    told = (tmp_path / "rows.jsonl").read_text() + json.dumps(row) + "\n"
    (tmp_path / "reminded.jsonl").write_text(told)
    message = message_of(path, "domains.letters.data.jsonl=reminded.jsonl")
    assert "domains.letters.data: " in message
    assert "has no token" in message
    said = {"messages": [{"role": "developer", "content": "say"}], "response": "1"}
    (tmp_path / "reminded.jsonl").write_text(json.dumps(said) + "\n" + told)
    assert "has no token" in message_of(path, "domains.letters.data.jsonl=reminded.jsonl")


def test_each_part_of_a_mixture_gives_something_to_train_on(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    rows = [json.dumps({"prompt": f"ask {i}", "answer": i}) + "\n" for i in range(64)]
    (tmp_path / "bare.jsonl").write_text("".join(rows))
    parts = "domains.letters.data={mixture: [{jsonl: rows.jsonl}, {jsonl: bare.jsonl}]}"
    message = message_of(path, parts)
    assert "domains.letters.data: part 1 of the mixture, jsonl bare.jsonl, has no row" in message
    checked(path, parts, "domains.letters.sft=null")


def test_a_part_that_repeats_another_is_told_so(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    data = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "again.jsonl").write_text("".join(data.splitlines(keepends=True)[:50]))
    parts = "domains.letters.data={mixture: [{jsonl: rows.jsonl}, {jsonl: again.jsonl}]}"
    message = message_of(path, parts)
    assert "part 1 of the mixture, jsonl again.jsonl, repeats prompts of the other" in message
    (tmp_path / "again.jsonl").write_text(data + data.replace("say", "write"))
    checked(path, parts)


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


def test_a_job_cannot_take_gpus_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    path = write_recipe(tmp_path)
    checked(path, "cluster.gpus_per_job=1")
    message = message_of(path, "cluster.gpus_per_job=2")
    assert message.startswith("--set: cluster.gpus_per_job: ")
    assert "finds 1 on this machine" in message


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_is_missed_before_anything_runs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    asked = ("distill.num_rollout_workers=1", "distill.rollout_backend=vllm")
    message = message_of(path, *asked)
    assert "distill.rollout_backend: vllm is asked for and not installed here" in message
    checked(path, *asked, "cluster.address=ray://head:10001")


def test_deepspeed_is_missed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path)
    optimizer = "distill.optimizer={name: adamw, learning_rate: 1.0e-3}"
    asked = (optimizer, "distill.learners.strategy=zero3")
    checked(path, *asked)
    monkeypatch.setattr("posttrain.pipeline.checks.find_spec", lambda name: None)
    message = message_of(path, *asked)
    assert "distill.learners.strategy: zero2 and zero3 are DeepSpeed's, which is not in" in message
    checked(path, *asked, "cluster.address=ray://head:10001")


def test_presets_have_the_context_that_prompts_are_checked_against() -> None:
    from posttrain.backbone.presets import PRESETS

    assert {name: p["max_position_embeddings"] for name, p in PRESETS.items()} == PRESET_CONTEXT
