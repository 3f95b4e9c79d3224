"""A judge's verdict: the last line that it wrote, and what it is worth beside a gold verdict.

    score("Two of three steps are shown.\\nScore: 7", gold_verdict=7)
    score("A gives its source.\\nBetter: A", gold_verdict="A")

For a judge that is trained itself, and for reading what one said (posttrain/judge.py). A verdict
becomes a number from 0 to 1: a score by its place on the scale, a preference as A's share of it.
"""

from __future__ import annotations

import math
import re

from rewards.score import RewardError, Score, shown

BETTER = {"A": 1.0, "tie": 0.5, "B": 0.0}

_SCORE = re.compile(r"Score: ([0-9]{1,9}(?:\.[0-9]{1,9})?)")
_BETTER = re.compile(rf"Better: ({'|'.join(BETTER)})")


def score(
    response: str,
    *,
    gold_verdict: object = None,
    low: float = 1,
    high: float = 10,
    by_distance: bool = False,
    **_: object,
) -> Score:
    """1 if the verdict is the gold one; what cannot be read earns nothing.

    Args:
        response: the judge's last turn.
        gold_verdict: a number on the scale, or `A`, `B` or `tie`.
        low, high: the scale's ends.
        by_distance: 1 less the distance to the gold verdict, the whole scale being 1.
    """
    wanted = _gold(gold_verdict, low=low, high=high)
    is_preference = isinstance(gold_verdict, str)
    found = read_better(response) if is_preference else read_score(response, low=low, high=high)
    last = shown(last_line(response))
    if found is None:
        return Score(0.0, f"no verdict in the last line, {last}")
    reward = 1 - abs(found - wanted) if by_distance else float(found == wanted)
    return Score(reward, f"{last} against {gold_verdict}")


def verdict_line(gold_verdict: object) -> str:
    """The line that says so."""
    return f"{'Better' if isinstance(gold_verdict, str) else 'Score'}: {gold_verdict}"


def read_score(text: str, *, low: float, high: float) -> float | None:
    """The place on the scale that the last line `Score: N` says, 0 to 1; None: it says none."""
    found = _SCORE.fullmatch(last_line(text))
    number = float(found[1]) if found else None
    return None if number is None or not low <= number <= high else (number - low) / (high - low)


def read_better(text: str) -> float | None:
    """1 where the last line says `Better: A`, 0 for B, 0.5 for tie; None: it says none of them."""
    found = _BETTER.fullmatch(last_line(text))
    return BETTER[found[1]] if found else None


def last_line(text: str) -> str:
    """The last line that is not blank, without the white space around it."""
    return text.rstrip().rpartition("\n")[2].strip()


def _gold(gold_verdict: object, *, low: float, high: float) -> float:
    if not low < high:
        raise RewardError(f"the scale of 'verdicts' is {low:g} to {high:g}: `low` is to be less")
    if isinstance(gold_verdict, str) and gold_verdict in BETTER:
        return BETTER[gold_verdict]
    number = math.nan if isinstance(gold_verdict, bool) else gold_verdict
    if isinstance(number, int | float) and low <= number <= high:
        return (number - low) / (high - low)
    raise RewardError(
        f"reward 'verdicts' needs a row's `gold_verdict` to be a number from {low:g} to {high:g}, "
        f"or A, B or tie, but it is {shown(gold_verdict)}"
    )
