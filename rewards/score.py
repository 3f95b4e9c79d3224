"""What a reward returns, and the one error it may raise: for bad gold, never a bad answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import fmean


class RewardError(ValueError):
    """A reward that is unknown or cannot be loaded, or a gold answer that cannot be used."""


@dataclass(frozen=True, slots=True)
class Score:
    """One graded answer: `Score(0.7, "84 against 85; 3 words", {"exact": 0.0, "short": 1.0})`."""

    reward: float
    """What training maximises: 1 is right, 0 is wrong, for every reward of this package. Not a
    number where nobody could tell: such an answer is left out, and counted."""
    reason: str
    """Why, in one line for the log."""
    terms: dict[str, float] = field(default_factory=dict[str, float])
    """The value of each named part, before its weight."""


def mean_reward(scores: Iterable[Score]) -> float:
    """The mean over the answers that have a reward; not a number where none has."""
    known = [score.reward for score in scores if not math.isnan(score.reward)]
    return fmean(known) if known else math.nan


Reward = Callable[..., Score | float]
"""`reward(response, *, answer=None, messages=None, **row)`: the last turn's text, then the row."""


def gold_text(answer: object, *, reward: str) -> str:
    """The gold answer as stripped text; RewardError where there is none to grade against."""
    if not isinstance(answer, str | int | float):
        raise RewardError(
            f"reward {reward!r} needs a row's `answer` to be text or a number, but it is "
            f"{type(answer).__name__}: give every row an `answer`, or choose another reward"
        )
    text = str(answer).strip()
    if not text:
        raise RewardError(
            f"reward {reward!r} got an empty `answer`, which silence would match: remove the row"
        )
    return text


def shown(value: object, *, limit: int = 60) -> str:
    """The value as Python writes it, cut for a reason or a message."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."
