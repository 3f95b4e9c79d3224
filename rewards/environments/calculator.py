"""A calculator with named memories: `{"rate": 0.2}` to start with; the last result is `ans`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from rewards.environments.base import Tool, ToolError, given, text
from rewards.expressions import ExpressionError, evaluate, parse

MAX_NAMES = 100

EXPRESSION = text("Such as (ans + 2) * rate ** 2; any name in memory may be used.")
NAME = text("What to call it.", pattern="^[a-z][a-z0-9_]{0,30}$")


class Calculator:
    """Expressions are those of `rewards.expressions`, of numbers up to 256 bits."""

    def __init__(self, start: object) -> None:
        memory = given(start, _is_number, what="names and numbers")
        self._memory: dict[str, int | float] = {"ans": 0, **memory}

    def calculate(self, expression: str) -> str:
        return self._keep("ans", expression)

    def store(self, name: str, expression: str) -> str:
        if name not in self._memory and len(self._memory) > MAX_NAMES:
            raise ToolError(f"there are {MAX_NAMES} names already")
        return self._keep(name, expression)

    def clear(self) -> str:
        self._memory = {"ans": 0}
        return "cleared"

    def state(self) -> dict[str, int | float]:
        return dict(self._memory)

    def _keep(self, name: str, expression: str) -> str:
        try:
            value = evaluate(parse(expression.strip()), **self._memory)
        except ExpressionError as error:
            raise ToolError(str(error)) from error
        if not _is_number(value):
            raise ToolError("the result is no number")
        self._memory[name] = cast("int | float", value)
        return str(value)

    TOOLS: ClassVar[Mapping[str, Tool]] = {
        "calculate": Tool(
            "The value of an expression, kept as ans.", {"expression": EXPRESSION}, calculate
        ),
        "store": Tool(
            "Keep a value under a name.", {"name": NAME, "expression": EXPRESSION}, store
        ),
        "clear": Tool("Forget all names; ans is 0.", {}, clear),
    }


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(cast("float", value)) < float("inf")
