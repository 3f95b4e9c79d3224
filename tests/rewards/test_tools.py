from typing import Any

import pytest

from rewards import RewardError
from rewards.tools import score

CALL = {"name": "look_up", "arguments": {"key": "n5", "depth": 2}}


def conversation(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "what is n5?"},
        {"role": "assistant", "content": "", "tool_calls": list(calls)},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42"},
    ]


def test_the_gold_answer_scores_exactly_1() -> None:
    assert score("42", answer="42", messages=conversation(CALL), call=CALL).reward == 1.0
    assert score(" 42\n", answer=42, messages=conversation(CALL), call=CALL).reward == 1.0
    assert score("42", answer="42", messages=conversation()).reward == 1.0


def test_further_calls_and_equal_numbers_do_not_hurt() -> None:
    other = {"name": "add", "arguments": {"a": 1}}
    same = {"name": "look_up", "arguments": {"depth": 2.0, "key": "n5"}}
    assert score("42", answer="42", messages=conversation(other, same), call=CALL).reward == 1.0


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([], "no tool was called"),
        ([{"name": "add", "arguments": {}}], "called 'add'"),
        ([{"name": "look_up", "arguments": {"key": "n6", "depth": 2}}], "'n6'"),
        ([{"name": "look_up", "arguments": {"key": "n5"}}], "needed"),
        ([{"name": "look_up", "arguments": {"key": "n5", "depth": 2, "x": 0}}], "needed"),
        ([{"name": "look_up", "arguments": {"key": ["n5"], "depth": 2}}], "needed"),
        ([{"name": "look_up", "arguments": "key=n5"}], "needed"),
        ([{"name": "look_up"}], "needed"),
    ],
)
def test_the_right_answer_without_the_required_call_scores_0(
    calls: list[dict[str, Any]], reason: str
) -> None:
    found = score("42", answer="42", messages=conversation(*calls), call=CALL)
    assert found.reward == 0.0
    assert reason in found.reason


def test_true_is_not_1() -> None:
    wanted = {"name": "f", "arguments": {"on": 1, "list": [1, 2]}}
    made = {"name": "f", "arguments": {"on": True, "list": [1, 2]}}
    assert score("42", answer="42", messages=conversation(made), call=wanted).reward == 0.0


@pytest.mark.parametrize("response", ["", "41", "42 42", "the answer is 42"])
def test_the_required_call_with_another_answer_scores_0(response: str) -> None:
    found = score(response, answer="42", messages=conversation(CALL), call=CALL)
    assert found.reward == 0.0
    assert "needed '42'" in found.reason


def test_a_call_in_the_prompt_is_not_the_models() -> None:
    messages = [*conversation(CALL), {"role": "user", "content": "and again?"}]
    messages.append({"role": "assistant", "content": "42"})
    assert score("42", answer="42", messages=messages, call=CALL).reward == 0.0


@pytest.mark.parametrize("call", [{}, {"name": 5}, {"name": "f", "arguments": "{}"}])
def test_bad_gold_is_an_error(call: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="call"):
        score("42", answer="42", messages=conversation(CALL), call=call)
    with pytest.raises(RewardError, match="answer"):
        score("42", messages=conversation(CALL), call=CALL)


def turns(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]


def put(key: str, value: str) -> dict[str, Any]:
    return {"name": "set", "arguments": {"key": key, "value": value}}


STORE = {"kind": "store", "start": {"a": "1"}}


def test_all_calls_and_no_others_may_be_asked_for() -> None:
    first, second = put("a", "1"), put("b", "2")
    for made, in_order, in_any in (
        ([first, second], 1.0, 1.0),
        ([second, first], 0.0, 1.0),
        ([first], 0.0, 0.0),
        ([first, second, second], 0.0, 0.0),
        ([first, first], 0.0, 0.0),
        ([], 0.0, 0.0),
    ):
        found = score("", calls=[first, second], messages=turns(*made))
        assert found.reward == in_order
        found = score("", calls=[first, second], messages=turns(*made), is_ordered=False)
        assert found.reward == in_any
    assert score("no tool helps", calls=[], messages=turns()).reward == 1.0


def test_an_argument_left_out_is_its_default() -> None:
    schema = {"type": "object", "properties": {"unit": {"default": "C"}, "city": {}}}
    tools = [{"name": "weather", "parameters": schema}]
    wanted = {"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}
    made = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert score("", calls=[wanted], tools=tools, messages=turns(made)).reward == 1.0
    assert score("", calls=[wanted], messages=turns(made)).reward == 0.0
    other = {"name": "weather", "arguments": {"city": "Oslo", "unit": "F"}}
    assert score("", calls=[wanted], tools=tools, messages=turns(other)).reward == 0.0


@pytest.mark.parametrize(
    "call",
    [
        {"name": "add", "arguments": {"a": 1}},
        {"name": "add", "arguments": {"a": 1, "b": "2"}},
        {"name": "add", "arguments": {"a": 1, "b": 2, "c": 3}},
        {"name": "add", "arguments": [1, 2]},
        {"name": "add"},
        {"name": "sub", "arguments": {"a": 1, "b": 2}},
        {},
    ],
)
def test_a_call_outside_its_schema_scores_0(call: dict[str, Any]) -> None:
    number = {"type": "number"}
    schema = {
        "type": "object",
        "properties": {"a": number, "b": number},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    tools = [{"name": "add", "parameters": schema}]
    good = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert score("3", answer="3", tools=tools, messages=turns(good)).reward == 1.0
    found = score("3", answer="3", tools=tools, messages=turns(good, call))
    assert found.reward == 0.0
    assert "an invalid call" in found.reason
    assert found.terms == {"calls": 2.0, "valid": 0.5}


def test_where_an_environment_ends_is_what_counts() -> None:
    delete = {"name": "delete", "arguments": {"key": "a"}}
    missing = {"name": "get", "arguments": {"key": "x"}}
    golds: list[dict[str, Any]] = [{"state": {"b": "2"}}, {"solution": [delete, put("b", "2")]}]
    for made, reward in (
        ([put("b", "2"), delete], 1.0),
        ([missing, put("b", "3"), put("b", "2"), delete], 1.0),  # errors and detours do not hurt
        ([put("b", "2")], 0.0),
        ([put("b", "2"), delete, put("c", "3")], 0.0),
        ([], 0.0),
    ):
        for gold in golds:
            found = score("done", environment=STORE, messages=turns(*made), **gold)
            assert found.reward == reward, (made, found.reason)
            found = score("no", environment=STORE, messages=turns(*made), answer="done", **gold)
            assert found.reward == 0.0


def test_calls_that_change_nothing_may_be_asked_for_where_nothing_is_to_change() -> None:
    get = {"name": "get", "arguments": {"key": "a"}}
    row: dict[str, Any] = {"environment": STORE, "state": {"a": "1"}, "calls": [get]}
    assert score("it is 1", messages=turns(get), **row).reward == 1.0
    assert score("it is 1", messages=turns(), **row).reward == 0.0
    row["calls"] = []
    with pytest.raises(RewardError, match="silence would do"):
        score("", messages=turns(), **row)


def test_a_conversation_of_several_turns_in_a_database() -> None:
    script = "CREATE TABLE stock (name TEXT, n INT); INSERT INTO stock VALUES ('tea', 3)"
    world = {"kind": "database", "start": script}
    sale = "UPDATE stock SET n = n - 2 WHERE name = 'tea'"
    sql = [{"name": "sql", "arguments": {"statement": s}} for s in (sale, "SELECT n FROM stock")]
    messages = [{"role": "user", "content": "sell two"}, *turns(*sql)]
    row: dict[str, Any] = {"environment": world, "answer": "1", "solution": sql[:1]}
    assert score("1", messages=messages, **row).reward == 1.0
    assert score("1", messages=messages[:1], **row).reward == 0.0  # guessed
    assert score("3", messages=messages, **row).reward == 0.0


@pytest.mark.parametrize(
    "row",
    [
        {"state": {"a": "1"}},
        {"environment": STORE, "state": {}, "solution": []},
        {"environment": STORE, "state": {"a": "1"}},  # silence would do
        {"environment": {"kind": "shop"}, "state": {}},
        {"calls": [{"name": 5}]},
        {"answer": "3", "tools": [{"parameters": {}}]},
        {"answer": "3", "tools": [{"name": "f", "parameters": {"type": 5}}]},
    ],
)
def test_gold_that_cannot_be_graded_is_an_error(row: dict[str, Any]) -> None:
    with pytest.raises(RewardError):
        score("3", messages=turns({"name": "f", "arguments": {}}), **row)
