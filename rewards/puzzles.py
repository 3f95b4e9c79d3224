"""Exact match on gold that a generator made: the answer and nothing else.

    score("the answer is <answer>4 2</answer>", answer="4  2")

For the tasks of reasoning-gym, whose own scorers are never called: nine of them run the response as
code, and others pay for repeating the answer, for "nan", or for a constant. White space, Unicode's
ways of writing one character and, where asked, case do not count. Behind an `<answer>` tag, the
last, the rest of the response does not count either.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from rewards.score import Score, gold_text, shown

_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)


def score(response: str, *, answer: object = None, ignore_case: bool = False, **_: object) -> Score:
    """1 if the response is the answer, runs of whitespace counting as one space."""
    wanted = normal(gold_text(answer, reward="exact"), ignore_case=ignore_case)
    tagged = _TAGGED.findall(response)
    found = normal(tagged[-1] if tagged else response, ignore_case=ignore_case)
    return Score(float(found == wanted), f"{shown(found)} against {shown(wanted)}")


def normal(text: str, *, ignore_case: bool = False) -> str:
    """The text as it is compared."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


def best_constant(answers: Iterable[object]) -> tuple[str, float]:
    """The answer that is right most often, and the share it scores: what accuracy is to beat."""
    counts = Counter(normal(str(answer)) for answer in answers)
    constant, count = counts.most_common(1)[0]
    return constant, count / counts.total()
