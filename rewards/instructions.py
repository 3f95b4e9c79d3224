"""Instruction following, on rows in IFEval's format: `instruction_id_list`, and `kwargs` for each.

    score("no commas here", instruction_id_list=["punctuation:no_comma"], kwargs=[{}])

Every instruction must hold. A response shorter than `min_words` fails whatever is asked, since
silence breaks few rules (a single space follows 190 of the 834 instructions in IFEval's rows); the
few instructions that one word may follow say so themselves. `loose` is IFEval's other way of
counting: an instruction holds if it does for the response without its first line, its last, its
asterisks, or any of these together, so that an introduction costs nothing. It is for comparison:
what is rewarded is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rewards import ifbench_checks, instruction_checks, languages
from rewards.instruction_checks import Check, arguments_of
from rewards.score import RewardError, Score
from rewards.texts import words

CHECKS: Mapping[str, Check] = {**instruction_checks.CHECKS, **ifbench_checks.CHECKS}
ARGUMENTS = {name: arguments_of(check) for name, check in CHECKS.items()}
"""The kwargs each instruction needs, and all that it takes."""

SHORT = {"posttrain:repeat", *ifbench_checks.ONE_WORD}
LANGUAGE = "language:response_language"


def score(
    response: str,
    *,
    instruction_id_list: Sequence[str] = (),
    kwargs: Sequence[Mapping[str, Any] | None] = (),
    min_words: int = 3,
    loose: bool = False,
    **_: object,
) -> Score:
    """1 if the response follows every instruction of the row; `followed` is the share it does."""
    checks = _checked(instruction_id_list, kwargs)
    num_words = len(words(response))
    if not response.strip():
        return Score(0.0, "the response is empty", {"followed": 0.0})
    if num_words < min_words and not all(name in SHORT for name, _ in checks):
        reason = f"{num_words} words, needed at least {min_words}"
        return Score(0.0, reason, {"followed": 0.0})
    versions = _versions(response) if loose else [response]
    problems = [_problem(versions, name, arguments) for name, arguments in checks]
    followed = {"followed": problems.count("") / len(problems)}
    for (name, _), problem in zip(checks, problems, strict=True):
        if problem:
            return Score(0.0, f"{name}: {problem}", followed)
    return Score(1.0, f"follows {', '.join(name for name, _ in checks)}", followed)


def prepare(items: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Load what tells languages apart before the clock of the first answer that needs it starts."""
    if any(LANGUAGE in (row.get("instruction_id_list") or ()) for _, row in items):
        languages.prepare()


def _versions(response: str) -> list[str]:
    """The response with and without its first line, its last line and its asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(lines[first:last]) for first, last in product((0, 1), (len(lines), -1))]
    cut = [text.strip() if text != response else text for text in cut]
    versions = [text for part in cut for text in (part, part.replace("*", ""))]
    return [text for text in versions if text.strip()]


def _problem(versions: Sequence[str], name: str, arguments: Mapping[str, Any]) -> str:
    """What is wrong with the first version; empty if nothing is with one of them."""
    try:
        problems = [CHECKS[name](version, **arguments) for version in versions]
    except (TypeError, AttributeError) as error:
        raise RewardError(
            f"instruction {name!r} cannot be checked with kwargs {arguments!r}: {error}"
        ) from error
    return "" if "" in problems else problems[0]


def _checked(
    names: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None]
) -> list[tuple[str, dict[str, Any]]]:
    """Each instruction with its arguments; IFEval's rows fill what it lacks with null."""
    if not names or len(names) != len(kwargs):
        raise RewardError(
            "reward 'instructions' needs a row's `instruction_id_list` and a `kwargs` of the same "
            f"length, but they have {len(names)} and {len(kwargs)} items"
        )
    checks: list[tuple[str, dict[str, Any]]] = []
    for name, given in zip(names, kwargs, strict=True):
        if name not in CHECKS:
            raise RewardError(f"unknown instruction {name!r}: use one of {', '.join(CHECKS)}")
        arguments = {key: value for key, value in (given or {}).items() if value is not None}
        required, allowed = ARGUMENTS[name]
        if not required <= arguments.keys() <= allowed:
            raise RewardError(
                f"instruction {name!r} takes {', '.join(sorted(allowed)) or 'nothing'} in kwargs, "
                f"but the row gives {', '.join(sorted(arguments)) or 'nothing'}"
            )
        checks.append((name, arguments))
    return checks
