"""A conversation comes back from its ids, whatever is said in it; any ids at all can be read."""

import random
from typing import Any

import pytest
from chat_talks import (
    SCHEMA,
    SYSTEM,
    assistant,
    developer,
    forgeries,
    reminder,
    tokenizer_called,
    tool,
    user,
)

from posttrain.chat import encode_example, encode_prompt, parse_conversation
from posttrain.tokenizer import BOS, EOS

NAMES = ["bytes", "bytes and a reminder", "merges", "deepseek"]
EFFORTS: list[Any] = ["none", "high", "max", 1, 37, 100]


def draw_talk(rng: random.Random, texts: list[str], *, effort: Any, reminds: bool) -> Any:
    """A conversation with tools, nothing of which is left out or joined; it ends with the
    assistant's turn."""
    talk: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(texts) or "s"}]
    talk = talk if rng.random() < 0.7 else []

    def answer(*, calls: bool) -> dict[str, Any]:
        reasoning = {"reasoning": rng.choice(texts) or "r"} if effort != "none" else {}
        arguments = {"x": rng.choice(texts), "n": [1, None, rng.choice(texts)]}
        made = [{"name": "f", "arguments": arguments}, {"name": "g", "arguments": {}}]
        return assistant(rng.choice(texts), **reasoning, **({"tool_calls": made} if calls else {}))

    for _ in range(rng.randint(1, 3)):
        if reminds and rng.random() < 0.5:
            talk.append(reminder(rng.choice(texts)))
        talk.append(user(rng.choice(texts)))
        while rng.random() < 0.5:
            talk += [answer(calls=True), *(tool(rng.choice(texts)) for _ in range(2))]
            talk += [user(rng.choice(texts))] if rng.random() < 0.4 else []
        talk.append(answer(calls=rng.random() < 0.2))
    return talk


def texts_of(name: str, rng: random.Random) -> list[str]:
    """Where a result's tag is no token its text would end it."""
    texts = [*rng.sample(forgeries(), 14), "plain", "", "\n\n", "a\n\nb", "日本\u2028\x85"]
    return [t for t in texts if "bytes" in name or "tool_result" not in t]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_encoded_comes_back_whatever_is_said(name: str) -> None:
    tokenizer, rng = tokenizer_called(name), random.Random(0)
    texts = texts_of(name, rng)
    for turn in range(60):
        effort, schema = EFFORTS[turn % len(EFFORTS)], {**SCHEMA, "description": rng.choice(texts)}
        reminds = name in ("bytes and a reminder", "deepseek")
        talk = draw_talk(rng, texts, effort=effort, reminds=reminds)
        tools = [schema, SCHEMA][: rng.randint(1, 2)]
        found = parse_conversation(
            tokenizer, encode_example(tokenizer, talk, tools=tools, effort=effort)[0]
        )
        assert (found.problem, found.effort, found.tools) == (None, effort, tools)
        assert found.messages == talk
        asked = parse_conversation(
            tokenizer, encode_prompt(tokenizer, talk[:-1], tools=tools, effort=effort)
        )
        assert (asked.problem, asked.effort) == (None, effort)
        assert asked.messages == talk[:-1]


@pytest.mark.parametrize("effort", ["none", "high"])
def test_what_comes_back_has_the_same_ids_where_something_was_joined_or_left_out(
    effort: Any,
) -> None:
    tokenizer = tokenizer_called("bytes")
    talk = [
        SYSTEM,
        SYSTEM,
        user("a"),
        user("b"),
        assistant("c", reasoning="left out"),
        developer("d"),
        user("e"),
        assistant("f", reasoning="g"),
    ]
    ids = encode_example(tokenizer, talk, effort=effort)[0]
    found = parse_conversation(tokenizer, ids)
    assert found.problem is None
    assert found.messages[:2] == [
        {"role": "system", "content": "Be brief.\n\nBe brief."},
        user("a\n\nb"),
    ]
    assert "left out" not in str(found.messages)
    again = encode_example(tokenizer, found.messages, tools=found.tools, effort=found.effort)
    assert again[0] == ids


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<｜User｜>a", "first token"),
        (f"{BOS}<｜User｜>a<｜Assistant｜>b{EOS}", "tell whether it thinks"),
        (f"{BOS}<｜User｜>a<｜Assistant｜></think>b", "no end"),
        (f"{BOS}<｜User｜>a<｜Assistant｜><think>b{EOS}", "reasoning has no end"),
        (f"{BOS}<｜User｜>a<｜Assistant｜></think>b{EOS}c<｜User｜>d", "after a turn's end"),
    ],
)
def test_what_is_wrong_is_told_and_the_rest_is_there(text: str, problem: str) -> None:
    tokenizer = tokenizer_called("bytes")
    found = parse_conversation(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert problem in (found.problem or "")
    assert found.messages[0] == user("a")
    assert len(found.messages) == text.count("<｜User｜>") + text.count("<｜Assistant｜>")


def test_a_schema_that_is_no_json_is_told() -> None:
    tokenizer = tokenizer_called("bytes")
    whole = tokenizer.decode(encode_prompt(tokenizer, [user("a")], tools=[SCHEMA]))
    broken = tokenizer(whole.replace('{"name"', '{"name'), add_special_tokens=False)["input_ids"]
    found = parse_conversation(tokenizer, broken)
    assert "no JSON" in (found.problem or "")
    assert (found.tools, found.messages) == ([], [user("a")])


def test_any_ids_at_all_can_be_read() -> None:
    tokenizer, rng = tokenizer_called("bytes and a reminder"), random.Random(0)
    for _ in range(2000):
        ids = rng.choices(range(len(tokenizer)), k=rng.randint(0, 40))
        parse_conversation(tokenizer, rng.choice([[0], []]) + ids)
