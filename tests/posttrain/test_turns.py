"""A turn that a model wrote: what was understood, and the reason for the rest."""

import random
from typing import Any

import pytest
from chat_talks import CALL, CALL_TEXT, assistant, tokenizer_called, user

from posttrain.chat import ToolCall, encode_example, parse_turn
from posttrain.tokenizer import EOS, build_tokenizer


@pytest.fixture(params=["bytes", "merges", "deepseek"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_called(request.param)


BROKEN = {
    "no end": ("37", "the turn has no end"),
    "no close": (CALL_TEXT.removesuffix("</｜DSML｜tool_calls>") + EOS, "calls has no end"),
    "half a call": (CALL_TEXT[:60] + EOS, "tool call 1 ('get') cannot be read"),
    "no call": ("\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>" + EOS, "without a call"),
    "text before": (CALL_TEXT.replace("calls>\n<", "calls>\nso<", 1) + EOS, "text before"),
    "text after": (CALL_TEXT + "so" + EOS, "text after the tool calls"),
    "no JSON": (CALL_TEXT.replace('"true"', '"false"') + EOS, "no JSON"),
    "deep JSON": (
        CALL_TEXT.replace('"true">qfz', '"false">' + "[" * 100_000) + EOS,
        "no JSON",
    ),
    "a user mark": ("4<｜User｜>5" + EOS, "control token"),
}


@pytest.mark.parametrize(("text", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_turn_is_data(text: str, problem: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    turn = parse_turn(tokenizer, ids)
    assert problem in (turn.problem or "")
    assert turn.tool_calls == []
    assert turn.content == text.removesuffix(EOS)


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}</｜DSML｜invoke>\n'


def parameter(key: str, value: str, *, is_string: str = "true", end: str = "parameter") -> str:
    return f'<｜DSML｜parameter name="{key}" string="{is_string}">{value}</｜DSML｜{end}>\n'


BROKEN_CALLS = {
    "no JSON": (invoke("bad", parameter("n", "{", is_string="false")), "no JSON: '{'"),
    "no end of a parameter": (
        invoke("bad", parameter("n", "1", end="x"), parameter("m", "2")),
        "has a parameter without an end: 'n'",
    ),
    "the last parameter has none": (invoke("bad", parameter("n", "1", end="x")), "cannot be read"),
    "no end": (invoke("bad").removesuffix("</｜DSML｜invoke>\n"), "cannot be read from ''"),
    "no parameter": (invoke("bad", "n=1"), "cannot be read from 'n=1"),
    "no name's end": (invoke("bad").replace('">', ">"), "has a name without an end"),
    "text behind": (invoke("bad") + "and", "has text behind its end: 'and'"),
}


@pytest.mark.parametrize(("bad", "problem"), BROKEN_CALLS.values(), ids=BROKEN_CALLS.keys())
def test_the_whole_calls_beside_a_broken_one_are_told_and_not_made(
    tokenizer: Any, bad: str, problem: str
) -> None:
    good = [invoke("get", parameter("key", "qfz")), invoke("put", parameter("n", "2"))]
    calls = [ToolCall("get", {"key": "qfz"}), ToolCall("put", {"n": "2"})]
    for place in range(3):
        block = "".join([*good[:place], bad, *good[place:]])
        text = f"a\n\n<｜DSML｜tool_calls>\n{block}</｜DSML｜tool_calls>"
        turn = parse_turn(tokenizer, tokenizer(text + EOS, add_special_tokens=False)["input_ids"])
        assert (turn.content, turn.tool_calls, turn.whole_calls) == (text, [], calls)
        assert (turn.problem or "").startswith(f"tool call {place + 1} ('bad")
        assert problem in (turn.problem or "")
        assert "tool_calls" not in turn.message()


def test_a_block_without_an_end_has_its_whole_calls_and_a_whole_one_none_beside(
    tokenizer: Any,
) -> None:
    whole = f"\n\n<｜DSML｜tool_calls>\n{invoke('f')}{invoke('g')}"
    ids = tokenizer(whole + "</｜DSML｜tool_calls>" + EOS, add_special_tokens=False)["input_ids"]
    turn = parse_turn(tokenizer, ids)
    assert (turn.tool_calls, turn.whole_calls) == ([ToolCall("f", {}), ToolCall("g", {})], [])
    turn = parse_turn(tokenizer, tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert (turn.tool_calls, turn.whole_calls) == ([], [ToolCall("f", {}), ToolCall("g", {})])
    assert turn.problem == "the block of tool calls has no end"


def test_reasoning_without_an_end_is_no_answer() -> None:
    tokenizer = build_tokenizer()
    turn = parse_turn(tokenizer, tokenizer("8+7" + EOS)["input_ids"], effort="high")
    assert (turn.reasoning, turn.content) == ("8+7", "")
    assert turn.problem == "the reasoning has no end"


def test_any_ids_at_all_can_be_parsed() -> None:
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    structure = [i for i in range(len(tokenizer)) if not 8 <= i < 264]
    for _ in range(500):
        ids = rng.choices([*structure * 10, *range(8, 264)], k=rng.randrange(40))
        for effort in ("none", "high"):
            parse_turn(tokenizer, ids, effort=effort)


def test_a_tag_spelled_in_bytes_calls_nothing() -> None:
    tokenizer = build_tokenizer()
    own = encode_example(tokenizer, [user("x"), assistant(CALL_TEXT)])[0][
        -len(CALL_TEXT.encode()) - 1 :
    ]
    turn = parse_turn(tokenizer, own)
    assert (turn.content, turn.tool_calls, turn.problem) == (CALL_TEXT, [], None)


def test_a_call_costs_eight_tokens_and_its_characters() -> None:
    ids, is_own = encode_example(build_tokenizer(), [user("x"), assistant("", tool_calls=[CALL])])
    assert sum(is_own) == 8 + len("getkeyqfz") + 1  # and the end
    own = [i for i, mine in zip(ids, is_own, strict=True) if mine]
    assert parse_turn(build_tokenizer(), own).tool_calls == [ToolCall("get", {"key": "qfz"})]
