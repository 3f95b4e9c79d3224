import time
from typing import Any

import pytest

from rewards import RewardError
from rewards.formats import repetition, score


def turn(content: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    said: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning is not None:
        said["reasoning"] = reasoning
    return [{"role": "user", "content": "?"}, said]


@pytest.mark.parametrize(
    ("response", "messages", "thinks"),
    [
        ("so 85", turn("so 85", "38+47"), True),
        ("so 85", turn("so 85", "  "), False),
        ("so 85", turn("so 85"), False),
        ("<think>38+47</think>so 85", None, True),
        ("\n<think>38+47</think>so 85", [{"role": "user", "content": "?"}], True),
        ("<think></think>so 85", None, False),
        ("so 85", None, False),
    ],
)
def test_thinking_is_there_or_not(response: str, messages: Any, thinks: bool) -> None:
    assert score(response, messages=messages, thinks=thinks).reward == 1.0
    assert score(response, messages=messages, thinks=not thinks).reward == 0.0


@pytest.mark.parametrize(
    ("response", "messages"),
    [
        ("so <think>38+47</think> 85", None),
        ("<think>38+47 so 85", None),
        ("38+47</think>so 85", None),
        ("<think>a</think>so<think>b</think> 85", None),
        ("<think><think>a</think></think>85", None),
        ("so 85</think>", turn("so 85</think>", "38+47")),
        ("so 85", turn("so 85", "38+47 <think>")),
    ],
)
def test_a_tag_out_of_place_is_malformed_whatever_is_asked(response: str, messages: Any) -> None:
    every: list[dict[str, Any]] = [{"thinks": True}, {"thinks": False}, {"max_words": 99}]
    for asked in every:
        found = score(response, messages=messages, **asked)
        assert found.reward == 0.0
        assert found.terms["tags"] == 0.0


def test_repetition_by_hand() -> None:
    # "a b c d e" has the runs abcd, bcde; "a b a b a b" has abab, baba, abab: 1 of 3 repeated.
    assert repetition("a b c d e") == 0.0
    assert repetition("a b a b a b") == pytest.approx(1 / 3, abs=1e-12)
    assert repetition("") == repetition("a b c") == 0.0
    assert repetition("no way " * 100) > 0.95
    assert repetition("\u4f60\u597d" * 100) > 0.95
    assert score("a b a b a b", max_repetition=0.4).reward == 1.0
    assert score("a b a b a b", max_repetition=0.3).reward == 0.0
    assert score("<think>" + "a b " * 9 + "</think>c", max_repetition=0.3).reward == 0.0


def test_words_are_counted_on_both_sides_of_the_mark() -> None:
    response = "<think>one two three</think>four five"
    cases: list[tuple[dict[str, Any], float]] = [
        ({"min_words": 2, "max_words": 2}, 1.0),
        ({"min_words": 3}, 0.0),
        ({"max_words": 1}, 0.0),
        ({"max_thinking_words": 3}, 1.0),
        ({"max_thinking_words": 2}, 0.0),
    ]
    for asked, reward in cases:
        assert score(response, **asked).reward == reward, asked
    assert score("\u4f60\u597d\u5417", min_words=3, max_words=3).reward == 1.0


def test_the_language_is_the_answers() -> None:
    response = "<think>Ich denke auf Deutsch dar\u00fcber nach</think>The answer is here."
    assert score(response, language="en").reward == 1.0
    assert score(response, language="de").reward == 0.0
    assert score("", language="en").reward == 0.0


def test_all_that_is_asked_must_hold_and_each_is_told() -> None:
    found = score("one two three", thinks=True, max_words=3, min_words=4)
    assert found.reward == 0.0
    assert found.terms == {"thinks": 0.0, "min_words": 0.0, "max_words": 1.0, "tags": 1.0}
    assert "no reasoning" in found.reason


def test_asking_for_nothing_is_an_error() -> None:
    with pytest.raises(RewardError, match="checks nothing"):
        score("a", answer="a")


@pytest.mark.parametrize(
    "response",
    ["<think>" * 50_000, "a " * 100_000, "</think>" * 50_000, "\ud800", "\u4f60" * 200_000],
)
def test_any_response_is_scored_in_time(response: str) -> None:
    start = time.monotonic()
    score(response, thinks=True, max_repetition=0.5, max_words=9, language="en")
    assert time.monotonic() - start < 5.0
