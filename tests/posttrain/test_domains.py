"""Rows of any source have one form, prompts never cross sides, bad data says what to mend."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.domains import (
    DataConfig,
    DomainSpec,
    Row,
    ToolConfig,
    fingerprint,
    import_object,
    is_heldout,
    load_rows,
    row_of,
    split,
)
from posttrain.errors import DataError, RecipeError


def load(data: DataConfig, folder: Path, seed: int = 0) -> list[Row]:
    return load_rows(data, folder=folder, seed=seed)


def jsonl(folder: Path, *lines: str | bytes) -> DataConfig:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    (folder / "data.jsonl").write_bytes(b"\n".join(encoded))
    return DataConfig(jsonl="data.jsonl")


def test_a_row_keeps_its_prompt_its_response_and_further_fields(tmp_path: Path) -> None:
    raw = {"prompt": "2+2=", "response": "<think>2,4</think>4", "answer": "4", "level": {"a": [1]}}
    (row,) = load(jsonl(tmp_path, "", json.dumps(raw), "  "), tmp_path)
    assert row.messages == [{"role": "user", "content": "2+2="}]
    assert row.response == [{"role": "assistant", "content": "4", "reasoning": "2,4"}]
    assert row.fields == {"answer": "4", "level": {"a": [1]}}


def test_the_forms_of_a_conversation_are_one() -> None:
    user = {"role": "user", "content": "Hi"}
    plain = row_of({"prompt": "Hi", "response": "Ho"}, where="x")
    assert plain == row_of({"messages": [user], "response": "Ho"}, where="x")
    assert plain == row_of({"prompt": [user], "response": "Ho"}, where="x")
    answered = [user, {"role": "assistant", "content": "Ho"}]
    assert plain == row_of({"messages": answered}, where="x")
    assert plain == row_of({"prompt": "Hi", "demonstration": answered[1:]}, where="x")


def test_openais_tool_calls_are_understood() -> None:
    function = {"name": "get", "arguments": '{"key": "qfz"}'}
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": function}],
    }
    result = {"role": "tool", "content": "37"}
    answer = {"role": "assistant", "content": "37", "reasoning_content": "so"}
    row = row_of({"prompt": "qfz?", "demonstration": [openai, result, answer]}, where="x")
    calls = [{"name": "get", "arguments": {"key": "qfz"}}]
    assert row.response == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        result,
        {"role": "assistant", "content": "37", "reasoning": "so"},
    ]


def talk(*told: str | None, ids: Sequence[str | None] = ("a", "b", "c")) -> list[dict[str, Any]]:
    """Calls with these ids, and results that name theirs, each with its id as its text."""
    function = {"name": "get", "arguments": {"key": "qfz"}}
    calls = [{"function": function, **({"id": i} if i else {})} for i in ids]
    results = [
        {"role": "tool", "content": i or "none", **({"tool_call_id": i} if i else {})} for i in told
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


def test_results_of_tools_go_in_the_order_of_their_calls() -> None:
    user, done = {"role": "user", "content": "u"}, {"role": "assistant", "content": "done"}

    def order(*told: str | None, **more: Any) -> list[str]:
        again = talk("b", "a", ids="ab")
        turns = [*talk(*told, **more), done, user, *again, done]
        said = row_of({"prompt": "Hi", "demonstration": turns}, where="x").response or []
        contents = [turn["content"] for turn in said if turn["role"] == "tool"]
        assert contents[-2:] == ["a", "b"]
        return contents[:-2]

    for told in permutations("abc"):
        assert order(*told) == ["a", "b", "c"]
    assert order("c", "a") == ["a", "c"]
    assert order("c", None, "a") == ["c", "none", "a"]  # as they stand, where one does not say
    assert order("b", "a", ids=("a", None)) == ["b", "a"]


@pytest.mark.parametrize("told", [["a", "x"], ["b", "b"]])
def test_a_result_of_no_call_or_a_second_one_is_refused(told: list[str]) -> None:
    with pytest.raises(DataError, match=r"demonstration\[2\]\.tool_call_id.*no result yet"):
        row_of({"prompt": "Hi", "demonstration": talk(*told)}, where="x")


GOOD = '{"prompt": "a"}'
BAD: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ('{"prompt": "a"', "line 2: found .* which is no JSON"),
    "deep JSON": ("[" * 100_000, "line 2: found .* which is no JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "line 2: found a byte that is no UTF-8"),
    "no object": ("[1]", r"line 2: found \[1\], needed an object"),
    "no prompt": (
        '{"question": "a"}',
        r"line 2: found neither \(it has question\) of the fields prompt",
    ),
    "two prompts": ('{"prompt": "a", "messages": []}', "line 2: found both of the fields prompt"),
    "a number": ('{"prompt": 3}', "line 2, field prompt: found 3, needed text"),
    "blank": ('{"prompt": " "}', "line 2, field prompt: found ' ', needed text"),
    "no messages": (
        '{"messages": []}',
        r"line 2, field messages: found \[\], needed a list such as",
    ),
    "a role": (
        '{"messages": [{"role": "bot", "content": "a"}]}',
        r"line 2, field messages\[0\]\.role: found 'bot', needed one of system, user,",
    ),
    "no content": (
        '{"messages": [{"role": "user"}]}',
        r"line 2, field messages\[0\]\.content: found None, needed text",
    ),
    "no user": (
        '{"messages": [{"role": "assistant", "content": "a"}]}',
        r"line 2, field messages\[0\]: .* needed a user message before the assistant's",
    ),
    "only a system text": (
        '{"messages": [{"role": "system", "content": "a"}]}',
        "line 2, field messages: .* needed at least one user message",
    ),
    "a late system text": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
        r"line 2, field messages\[1\]: .* needed system messages in front",
    ),
    "a reminder too late": (
        '{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "latest_reminder", "content": "b"}, {"role": "user", "content": "c"}]}',
        r"line 2, field messages\[1\]: .* needed a reminder before what the user says",
    ),
    "a reminder at the end": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
        '{"role": "latest_reminder", "content": "c"}]}',
        r"line 2, field messages\[2\]: .* needed a message after a reminder",
    ),
    "two turns in a row": (
        '{"prompt": "a", "demonstration": [{"role": "assistant", "content": "b"}, '
        '{"role": "assistant", "content": "c"}]}',
        r"line 2, field demonstration\[1\]: .* needed a user message before the assistant's",
    ),
    "response": ('{"prompt": "a", "response": 4}', "line 2, field response: found 4, needed text"),
    "two answers": (
        '{"prompt": "a", "response": "b", "demonstration": []}',
        "line 2: found a response and a demonstration",
    ),
    "a call": (
        '{"prompt": "a", "demonstration": [{"role": "assistant", "tool_calls": [{"name": 1}]}]}',
        r"line 2, field demonstration\[0\]\.tool_calls\[0\]: .* needed \{\"name\"",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_with_its_place_and_remedy(
    tmp_path: Path, line: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(jsonl(tmp_path, GOOD, line), tmp_path)
    assert str(tmp_path / "data.jsonl") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path, "")
    with pytest.raises(DataError, match=r"data\.jsonl has no rows: needed is at least one"):
        load(DataConfig(jsonl="data.jsonl"), tmp_path)
    with pytest.raises(
        DataError, match=r"dat\.jsonl: there is no such file; did you mean data\.jsonl"
    ):
        load(DataConfig(jsonl="dat.jsonl"), tmp_path)


def test_columns_rename_and_limit_cuts(tmp_path: Path) -> None:
    data = jsonl(tmp_path, *(json.dumps({"question": f"q{i}", "a": i}) for i in range(5)))
    renamed = data.model_copy(update={"columns": {"prompt": "question", "answer": "a"}, "limit": 2})
    rows = load(renamed, tmp_path)
    assert [(r.messages[0]["content"], r.fields) for r in rows] == [
        ("q0", {"answer": 0}),
        ("q1", {"answer": 1}),
    ]
    wrong = data.model_copy(update={"columns": {"prompt": "query"}})
    with pytest.raises(DataError, match="line 1: found the fields question, a, needed 'query'"):
        load(wrong, tmp_path)


def test_a_users_function_gives_rows(tmp_path: Path) -> None:
    (tmp_path / "own_rows.py").write_text(
        "def rows(*, size, seed):\n"
        "    for i in range(size):\n        yield {'prompt': f'{seed}-{i}'}\n"
        "def broken():\n    yield {'prompt': 'a'}\n    1 / 0\n"
    )
    data = DataConfig(python="own_rows:rows", args={"size": 2})
    assert [r.messages[0]["content"] for r in load(data, tmp_path, seed=7)] == ["7-0", "7-1"]
    fixed = DataConfig(python="own_rows:rows", args={"size": 1, "seed": 9})
    assert [r.messages[0]["content"] for r in load(fixed, tmp_path, seed=7)] == ["9-0"]
    with pytest.raises(
        DataError, match=r"own_rows:rows with arguments \{'siz': 2\} raised TypeError"
    ):
        load(DataConfig(python="own_rows:rows", args={"siz": 2}), tmp_path)
    with pytest.raises(DataError, match=r"own_rows:broken .* raised ZeroDivisionError"):
        load(DataConfig(python="own_rows:broken"), tmp_path)


def test_a_data_set_of_the_hub_gives_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gsm"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    # An id that is a local folder: the same loader, without a network.
    data = DataConfig(hub=str(folder), columns={"prompt": "question"})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (row,) = load(data, tmp_path)
    assert (row.messages[0]["content"], row.fields) == ("1+1", {"answer": "2"})
    with pytest.raises(
        DataError, match=r"split test\) could not be loaded: ValueError: .*data\.hub"
    ):
        load(data.model_copy(update={"split": "test"}), tmp_path)


def test_reasoning_gym_gives_questions_and_answers(tmp_path: Path) -> None:
    data = DataConfig(reasoning_gym={"task": "gcd", "size": 20})
    rows = load(data, tmp_path, seed=3)
    assert rows == load(data, tmp_path, seed=3)
    assert rows != load(data, tmp_path, seed=400)
    assert all(row.fields["answer"].isdigit() and row.fields["metadata"] for row in rows)
    with pytest.raises(DataError, match="reasoning_gym has no task 'gdc': did you mean gcd"):
        load(DataConfig(reasoning_gym={"task": "gdc"}), tmp_path)
    with pytest.raises(DataError, match="reasoning_gym gcd refused"):
        load(DataConfig(reasoning_gym={"task": "gcd", "siez": 2}), tmp_path)


def numbered(count: int) -> list[Row]:
    return [row_of({"prompt": f"{i}+{i}="}, where="x") for i in range(count)]


def test_a_prompt_never_crosses_sides() -> None:
    rows = numbered(4000)
    train, heldout = split(rows, 0.125)
    assert sorted(r.id for r in (*train, *heldout)) == sorted(r.id for r in rows)
    # six standard deviations of a binomial share with n = 4000
    assert abs(len(heldout) / 4000 - 0.125) < 6 * (0.125 * 0.875 / 4000) ** 0.5
    again = split(rows[::-3], 0.125)
    assert {r.id for r in again[0]} <= {r.id for r in train}
    assert {r.id for r in again[1]} <= {r.id for r in heldout}
    assert all(is_heldout(r.messages, 0.125) for r in heldout)
    assert not any(is_heldout(r.messages, 0.125) for r in train)


def test_a_larger_share_holds_out_a_superset() -> None:
    rows = numbered(500)
    few, many = ({r.id for r in split(rows, share)[1]} for share in (0.1, 0.4))
    assert few < many


def test_what_another_domain_may_hold_out_is_on_neither_side() -> None:
    rows = numbered(500)
    train, heldout = split(rows, 0.1, untrained_share=0.4)
    assert train == split(rows, 0.4)[0]
    assert heldout == split(rows, 0.1)[1]
    assert split(rows, 0.4, untrained_share=0.1) == split(rows, 0.4)


def test_spelling_and_spacing_do_not_change_sides() -> None:
    for i in range(200):
        sides = {
            is_heldout([{"role": "user", "content": text}], 0.5)
            for text in (f"What is {i}?", f" what  is\n{i}? ", f"WHAT IS {i}?")
        }
        assert len(sides) == 1


def test_of_equal_prompts_the_first_stays() -> None:
    rows = [row_of({"prompt": "a", "answer": i}, where="x") for i in range(3)]
    train, heldout = split(rows, 0.5)
    assert [row.fields["answer"] for row in (*train, *heldout)] == [0]


def test_a_fingerprint_changes_with_what_decides_the_rows(tmp_path: Path) -> None:
    data = jsonl(tmp_path, GOOD)
    marks = [fingerprint(data, tmp_path)]
    marks.append(fingerprint(data.model_copy(update={"limit": 1}), tmp_path))
    jsonl(tmp_path, GOOD, GOOD)
    marks.append(fingerprint(data, tmp_path))
    source = DataConfig(python="mine:rows")
    (tmp_path / "helper_of_mine.py").write_text("x = 1\n")
    (tmp_path / "mine.py").write_text("from helper_of_mine import x\ndef rows(): ...\n")
    marks.append(fingerprint(source, tmp_path))
    (tmp_path / "helper_of_mine.py").write_text("x = 2\n")
    marks.append(fingerprint(source, tmp_path))
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert fingerprint(source, tmp_path) == marks[-1]
    assert len(set(marks)) == len(marks)
    with pytest.raises(DataError, match="there is no such file"):
        fingerprint(DataConfig(jsonl="none"), tmp_path)


def test_a_generated_domains_fingerprint_knows_what_it_imports(tmp_path: Path) -> None:
    from posttrain.domains.fingerprint import sources

    found = sources("posttrain.generated.code", tmp_path)
    assert {"posttrain.generated.code", "posttrain.generated.mixing"} <= found.keys()
    assert "posttrain.pipeline" not in found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "is no place of a function: write module:function"),
        (
            "no_such_module:f",
            r"there is no module 'no_such_module': put it at .*no_such_module\.py",
        ),
        ("user_module:g", r"has no 'g' \(it has f, x\): correct the name"),
        ("user_module_that_fails:f", "importing it raised ZeroDivisionError"),
        ("user_module_that_misses:f", "importing it raised ModuleNotFoundError.*no_such_library"),
        ("user_module:x", "is int: needed is a function"),
        ("json:loads", "has the name of another module"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "user_module.py").write_text("def f(): ...\nx = 5\n")
    (tmp_path / "user_module_that_fails.py").write_text("1 / 0\n")
    (tmp_path / "user_module_that_misses.py").write_text("import no_such_library\n")
    (tmp_path / "json.py").write_text("def loads(): ...\n")
    with pytest.raises(RecipeError, match=message):
        import_object(path, tmp_path)


def test_each_recipes_folder_has_its_own_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "namesake_helper.py").write_text(f"def x(): return {name!r}\n")
        (folder / "namesake.py").write_text("from namesake_helper import x\n")
    found = [import_object("namesake:x", tmp_path / name)() for name in ("a", "b", "a", "a")]
    assert found == ["a", "b", "a", "a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of jsonl, parquet, hub, .*, mixture says .* found none"),
        ({"jsonl": "a", "hub": "b"}, "found jsonl and hub"),
        ({"jsonl": "a", "subset": "b"}, "subset belongs to hub"),
        ({"hub": "a", "args": {"b": 1}}, "args belongs to python"),
        ({"reasoning_gym": {"size": 2}}, "needs a task"),
        ({"json": "a"}, "Extra inputs"),
    ],
)
def test_a_source_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**fields)


def test_a_domain_that_cannot_be_is_refused() -> None:
    data, tool = DataConfig(jsonl="a"), ToolConfig(python="a:b", name="get")
    with pytest.raises(ValidationError, match="two tools are called 'get'"):
        DomainSpec(name="d", data=data, reward="exact", tools=[tool, tool])
    with pytest.raises(ValidationError, match="name a reward"):
        DomainSpec(name="d", data=data, reward={"exact": 0.0})
    assert DomainSpec(name="d", data=data, reward="exact").reward_weights == {"exact": 1.0}


def test_domains_are_checked_without_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets'}"
    script = f"import sys, posttrain.domains; print({heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
