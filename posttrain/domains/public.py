"""Rows of public data sets in our form, for a recipe's `data.convert`."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from posttrain.errors import DataError
from rewards.literals import NotALiteral, read
from rewards.sandbox import Level, Limits, Sandbox, SandboxError, shared

MAX_TESTS = 50
TOLERANCE = 1e-6
"""HumanEval+ compares floats so; its rows' `atol` is for few of them."""


def humaneval(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """HumanEval+ (evalplus): each input's expected value is what the canonical solution gives, run
    in the sandbox. Inputs whose value is no plain literal are left out, and rows without two
    different values.

    The prompt's own head comes in front of the program, so that a response may be the whole
    function or its body.

    Raises:
        DataError: this machine has no sandbox of namespaces; `humaneval_at_landlock` and
            `humaneval_at_limits` accept less, by their names.
    """
    return _humaneval(json.dumps(raw), "namespaces")


def humaneval_at_landlock(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same, also where landlock is the best that this machine has."""
    return _humaneval(json.dumps(raw), "landlock")


def humaneval_at_limits(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same, also where the data's programs can be kept in by limits alone."""
    return _humaneval(json.dumps(raw), "limits")


@cache
def _humaneval(written: str, lowest: Level) -> dict[str, Any] | None:
    """Once for each row and process: a recipe's checks and stages read rows again."""
    raw: dict[str, Any] = json.loads(written)
    name, head = raw["entry_point"], raw["prompt"]
    inputs = [*raw["base_input"], *raw["plus_input"]][:MAX_TESTS]
    calls = [f"{name}(*{arguments!r})" for arguments in inputs]
    gold = head + raw["canonical_solution"]
    run = _sandbox(lowest).run(gold, calls=calls, limits=Limits(wall_s=20.0))
    tests = [
        {"call": call, "expect": result.text}
        for call, result in zip(calls, run.results, strict=False)
        if not result.error and _is_literal(result.text)
    ]
    if len({test["expect"] for test in tests}) < 2:
        return None
    return {
        "prompt": f"Complete this function. Answer with a block of Python.\n\n{head}",
        "prelude": head,
        "tests": tests,
        "tolerance": max(TOLERANCE, float(raw.get("atol") or 0.0)),
        "response": f"```python\n{gold}\n```",
    }


def _sandbox(lowest: Level) -> Sandbox:
    try:
        return shared(lowest)
    except SandboxError as error:
        raise DataError(
            f"the data's own programs give the expected values, and {error}; here by name of the "
            "function in data.convert: posttrain.domains.public:humaneval_at_landlock or "
            "humaneval_at_limits"
        ) from None


def _is_literal(text: str) -> bool:
    try:
        read(text)
    except NotALiteral:
        return False
    return True
