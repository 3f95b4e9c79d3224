"""Mathematics: is the response's final answer the gold one?

Gold that is a number or plain words is matched by rules of our own, faster and stricter than
math-verify (which takes "12+13" for 25, "5 cm" for "5 m" and "1e6" for 1). Anything else (LaTeX,
tuples, intervals) goes to math-verify, in a process of its own with a bound on time and memory
(`rewards.verifier`), and what would run into these is mostly turned away first.

Where the final answer is looked for: the last \\boxed{...}; else the response as a whole, or what
follows its last "=" or ":"; else, for a number, the last one that at least two words lead up to.
So an answer followed by junk ("85 foo", "855", "85abc") is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rewards import verifier
from rewards.score import Score, gold_text, shown

MAX_TAIL = 400
"""Characters at the end of a response that are looked at."""
MAX_DIGITS = 60

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\s*(?P<digits>{_DIGITS})(?:/(?P<under>\d+))?")
_FREE_NUMBER = re.compile(
    rf"(?<![\w.,/])(?:(?<![\w)])[-+]\s*)?(?:{_DIGITS})(?:/\d+)?(?![\w%/]|[.,]\d)"
)
_FRACTION = re.compile(r"\\[dt]?frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_POWER = r"(?:\^\{?-?\d\}?)?"
_UNIT = re.compile(rf"\\?%|[^\W\d_]+{_POWER}(?:[ */'-]+[^\W\d_]+{_POWER})*")
_PERCENT = re.compile(r"(?<=[\d.])\s*\\?%$")
_MIXED = re.compile(r"(-?)(\d+) ?(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))")
_DECORATION = re.compile(
    r"\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z])|\\\$|\$|\\[()\[\]]|\^\{?\\circ\}?"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_ANNOUNCED = re.compile(r"\b(?:answer|result)\s*(?:is|:|=)\s*", re.IGNORECASE)


def score(response: str, *, answer: object = None, **_: object) -> Score:
    """1 if the final answer of the response equals `answer`."""
    gold = gold_text(answer, reward="mathematics")
    gold = _plain(_boxed(gold) or gold)
    tail = response.strip()[-MAX_TAIL:]
    boxed = _boxed(response)
    if boxed is None and "\\boxed" in tail:
        return Score(0.0, "the box is not closed")
    found = _plain(boxed if boxed is not None else _last_statement(tail))
    reason = f"{shown(found)} against {shown(gold)}"
    if _squeezed(found) == _squeezed(gold) or (len(gold) == 1 and found == f"({gold})"):
        return Score(1.0, reason)
    literal, unit = _measure(gold)
    wanted = _number(literal)
    if wanted is not None:
        return _number_score(_final_number(tail) if boxed is None else found, wanted, unit, reason)
    if _WORDS.fullmatch(gold):
        return Score(0.0, reason)
    return _verified(found, gold, reason)


def prepare(items: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Start math-verify (seconds) before the clock of the first answer that needs it starts."""
    golds = (str(row.get("answer", "")).strip() for _, row in items)
    plain = (_plain(_boxed(gold) or gold) for gold in golds)
    if not all(_number(_measure(g)[0]) is not None or _WORDS.fullmatch(g) for g in plain):
        verifier.shared().start()


def _number_score(answer: str, wanted: Fraction, unit: str, reason: str) -> Score:
    literal, found_unit = _measure(answer.rpartition("=")[2].strip())
    found = _number(literal)
    if found is None:
        return Score(0.0, f"{reason}: no number as final answer")
    if found_unit != unit and (found_unit == "%" or (unit and found_unit)):
        return Score(0.0, f"{reason}: another unit")  # none is the one that was asked for
    # 170/2 for 85 leaves the work undone; 2/4 for 1/2 does not.
    is_undone = wanted.denominator == 1 and ("/" in literal or "frac" in literal)
    return Score(float(found == wanted and not is_undone), reason)


def _measure(text: str) -> tuple[str, str]:
    """`5 cm` as ("5", "cm"), 50\\% as ("50", "%"); the unit is empty where there is none."""
    text = _PERCENT.sub(" %", text)
    literal, space, unit = text.partition(" ")
    return (literal, unit) if space and _UNIT.fullmatch(unit) else (text, "")


def _final_number(text: str) -> str:
    """The literal that a response without a box gives as its answer; empty if it gives none."""
    short = _plain(re.split(r"[=:]", text)[-1])
    if _number(_PERCENT.sub("", short)) is not None:
        return short
    found = list(_FREE_NUMBER.finditer(text))
    if not found or len(re.findall(r"[^\W\d_]{2,}", text[: found[-1].start()])) < 2:
        return ""
    return found[-1].group()


def _last_statement(text: str) -> str:
    """The part of a response without a box that can be its answer: announced, in $...$, or all."""
    announced = list(_ANNOUNCED.finditer(text))
    if announced:
        return text[announced[-1].end() :]
    inline = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    return next(filter(None, inline[-1])) if inline else text


def _boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds; None if there is none or its brace is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), min(len(text), start + MAX_TAIL)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def _plain(text: str) -> str:
    """Without dollar signs, spacing and text commands, degrees and the final full stop."""
    text = text.replace("{,}", ",").replace("\u2212", "-")
    text = _WRAPPED.sub(r" \1 ", _DECORATION.sub("", text))
    return " ".join(text.split()).removesuffix(".").strip()


def _squeezed(text: str) -> str:
    """For comparing: words without case, anything else (variables have case) without spaces."""
    if len(text) > 1 and _WORDS.fullmatch(text):
        return text.casefold()
    return re.sub(r"(?<!\w) | (?!\w)", "", re.sub(r"\\[dt]frac", r"\\frac", text))


def _number(text: str) -> Fraction | None:
    """The value of a plain literal: 85, -1,234.50, 1/2, \\frac{1}{2}, 3 1/2; None for anything
    else."""
    mixed = _MIXED.fullmatch(text)
    if mixed is not None and len(text) <= MAX_DIGITS:
        sign, whole, *parts = mixed.groups()
        over, under = map(int, filter(None, parts))
        return Fraction(int(whole) * under + over, under) * (-1 if sign else 1) if under else None
    text = _FRACTION.sub(r"\1\2/\3\4", text)
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > MAX_DIGITS:
        return None
    under = int(match["under"] or 1)
    return Fraction(match["sign"] + match["digits"].replace(",", "")) / under if under else None


_COSTLY = re.compile(
    r"!|\\(?:binom|choose|sum|prod|i*int|lim|det|gamma|Gamma|zeta)|\bC\(|\d{21}|\*\*"
    r"|\^\s*\{[^{}]*(?:\d{4}|[\d)\]}]\s*\^|\^\s*\{[^{}]*\^)|\^\s*\w\s*\^"
)
MAX_TERMS = 200


def _num_terms(text: str) -> int:
    """A bound on the terms that multiplying out makes: sums add, factors multiply, powers raise."""
    sums, products = [0], [1]
    for part in re.finditer(r"[-+,&=<>]|[(\[{]|[)\]}]\s*(?:\^\s*\{?(?P<power>\d+))?", text):
        if part[0] in "([{":
            sums.append(0)
            products.append(1)
        elif part[0][0] not in ")]}":
            sums[-1] += products[-1]
            products[-1] = 1
        elif len(sums) > 1:
            inside = sums.pop() + products.pop()
            power = min(int(part["power"] or 1), 100)
            products[-1] = min(products[-1] * inside**power, MAX_TERMS + 1)
    return sum(sums) + sum(products)


def _is_costly(text: str) -> bool:
    is_crowded = len(re.findall(r"\d+", text)) > 40 or text.count("{") > 40
    is_long = len(text) > MAX_TAIL or is_crowded
    return is_long or _COSTLY.search(text) is not None or _num_terms(text) > MAX_TERMS


def _verified(found: str, gold: str, reason: str) -> Score:
    """math-verify's judgement, for LaTeX that is small enough to be compared."""
    if _is_costly(found) or _is_costly(gold):
        return Score(0.0, f"{reason}: too large to be compared except as text")
    if {_is_set(found), _is_set(gold)} == {True, False} and "(" in (found[:1], gold[:1]):
        return Score(0.0, f"{reason}: a set is no tuple")
    try:
        return Score(float(verifier.shared().equal(gold, found)), reason)
    except verifier.NoVerdict as error:
        return Score(0.0, f"{reason}: {error}")


def _is_set(text: str) -> bool:
    return text.startswith("\\{") and text.endswith("\\}")
