"""What every simulated environment is: a start, tools that change it, and a state to compare.

An environment has no clock and no chance, so that the same calls lead to the same texts and the
same state, wherever and however often they are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from rewards.schemas import invalid
from rewards.score import RewardError

Json = Any

MAX_ARGUMENTS = 20_000
"""Characters of a call's arguments as JSON."""
MAX_RESULT = 4_000
"""Characters of a tool's answer."""


class ToolError(Exception):
    """What a call comes to that cannot be done; the model reads the message and can mend it."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as a prompt shows it, with what it does to an environment."""

    description: str
    properties: Mapping[str, Json]
    """The JSON schema of each argument; all are required but those with a default."""
    function: Callable[..., str]

    @property
    def parameters(self) -> dict[str, Json]:
        """The JSON schema of its arguments."""
        required = [name for name, schema in self.properties.items() if "default" not in schema]
        return {
            "type": "object",
            "properties": dict(self.properties),
            "required": required,
            "additionalProperties": False,
        }


class Environment(Protocol):
    """Made from a row's `start`: RewardError where it cannot be used."""

    TOOLS: ClassVar[Mapping[str, Tool]]

    def __init__(self, start: object) -> None: ...

    def state(self) -> Json:
        """What is compared, as JSON values."""
        ...


def use(environment: Environment, name: str, arguments: object) -> str:
    """The text that a call gets: the tool's, or `error: ...`. It never raises."""
    tool = environment.TOOLS.get(name)
    if tool is None:
        return f"error: no tool {name!r}, there is {', '.join(environment.TOOLS)}"
    try:
        size = len(json.dumps(arguments))
    except (TypeError, ValueError, RecursionError):
        return "error: the arguments are no JSON"
    if size > MAX_ARGUMENTS:
        return f"error: the arguments are longer than {MAX_ARGUMENTS} characters"
    problem = invalid(arguments, tool.parameters)
    if problem:
        return f"error: {problem}"
    assert isinstance(arguments, Mapping)
    try:
        result = tool.function(environment, **arguments)
    except ToolError as error:
        result = f"error: {error}"
    return result if len(result) <= MAX_RESULT else f"{result[:MAX_RESULT]}... (cut)"


def given(start: object, accepts: Callable[[object], bool], *, what: str) -> dict[str, Any]:
    """A start that is names and values, nothing by default; RewardError where it is not."""
    if start is None:
        return {}
    if not isinstance(start, Mapping) or not all(map(accepts, start.values())):
        raise RewardError(f"an environment of this kind starts from {what}, not from {start!r}")
    return {str(name): value for name, value in start.items()}


def is_text(value: object) -> bool:
    return isinstance(value, str)


def text(description: str, **more: Json) -> dict[str, Json]:
    """The JSON schema of a text."""
    return {"type": "string", "description": description, **more}
