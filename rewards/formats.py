"""The form of an answer, whatever it says: thinking, language, repetition, length.

    score("So it is.", thinks=True, max_words=50, messages=[..., {"reasoning": "38+47...", ...}])

Each check that is asked for is a term of 0 or 1; the reward is 1 if all hold. A conversation's last
turn has its `reasoning` taken out by the chat format; without `messages` it is what stands between
the tags at the response's beginning. A tag anywhere else is malformed, whatever is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards import languages
from rewards.score import RewardError, Score
from rewards.texts import miscount

NUM_GRAM = 4
"""Words in a row that count as repeated."""

_TAG = re.compile(r"</?think>")
_UNIT = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]|\w+")
"""A word, or a character of a script that is written without spaces."""


def score(
    response: str,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    thinks: bool | None = None,
    language: str | None = None,
    max_repetition: float | None = None,
    min_words: int | None = None,
    max_words: int | None = None,
    max_thinking_words: int | None = None,
    **_: object,
) -> Score:
    """1 if the answer has the form that is asked for.

    Args:
        response: the last turn's text.
        messages: the conversation.
        thinks: there is reasoning, or there is none.
        language: the answer's, as an ISO 639-1 code.
        max_repetition: see `repetition`, of reasoning and answer together.
        min_words, max_words: of the answer.
        max_thinking_words: of the reasoning.
    """
    reasoning, answer = _parts(response, messages)
    num_words = len(_units(answer))
    problems: dict[str, str] = {}
    if thinks is not None:
        said = "no reasoning" if thinks else "reasoning"
        problems["thinks"] = said if bool(reasoning.strip()) is not thinks else ""
    if language is not None:
        found = languages.language_of(answer) if answer.strip() else "nothing"
        problems["language"] = "" if found == language else f"in {found!r}, needed {language!r}"
    if max_repetition is not None:
        share = repetition(f"{reasoning}\n{answer}")
        problems["repetition"] = f"{share:.2f} repeated" if share > max_repetition else ""
    if min_words is not None:
        problems["min_words"] = miscount("words", num_words, min_words, "at least")
    if max_words is not None:
        problems["max_words"] = miscount("words", num_words, max_words, "at most")
    if max_thinking_words is not None:
        thought = len(_units(reasoning))
        problems["max_thinking_words"] = miscount(
            "words of reasoning", thought, max_thinking_words, "at most"
        )
    if not problems:
        raise RewardError(
            "reward 'formats' checks nothing: give a row, or the reward's options, one of thinks, "
            "language, max_repetition, min_words, max_words, max_thinking_words"
        )
    problems["tags"] = "a thinking tag out of place" if _TAG.search(reasoning + answer) else ""
    terms = {name: float(not problem) for name, problem in problems.items()}
    reason = "; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem)
    return Score(float(not reason), reason or "has the form asked for", terms)


def prepare(items: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Load what tells languages apart before the clock of the first answer that needs it starts."""
    if any(row.get("language") for _, row in items):
        languages.prepare()


def repetition(text: str) -> float:
    """The share of runs of NUM_GRAM words that have been there before: 0 for a text without, near 1
    for one that goes round in circles."""
    units = _units(text.lower())
    runs = list(zip(*(units[start:] for start in range(NUM_GRAM)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _units(text: str) -> list[str]:
    return _UNIT.findall(text)


def _parts(response: str, messages: Sequence[Mapping[str, Any]] | None) -> tuple[str, str]:
    """Reasoning and answer."""
    if messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("reasoning") or ""), response
    reasoning, mark, answer = response.partition("</think>")
    if not mark or not reasoning.lstrip().startswith("<think>"):
        return "", response
    return reasoning.lstrip().removeprefix("<think>"), answer
