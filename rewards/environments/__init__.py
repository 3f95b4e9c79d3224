"""Simulated worlds for tools: calculator, store, files, database.

    replay({"kind": "store", "start": {"a": "1"}}, [{"name": "delete", "arguments": {"key": "a"}}])
    == Replay(results=["deleted"], state={})

They take whatever a model sends in bounded time and memory, and reach nothing outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.environments.base import Environment, Tool, use
from rewards.environments.calculator import Calculator
from rewards.environments.database import Database
from rewards.environments.files import Files
from rewards.environments.store import Store
from rewards.score import RewardError, shown

KINDS: Mapping[str, type[Environment]] = {
    "calculator": Calculator,
    "database": Database,
    "files": Files,
    "store": Store,
}

Call = Mapping[str, Any]
"""`{"name": "get", "arguments": {"key": "a"}}`."""

MAX_CALLS = 100
"""Calls of one conversation that are made; the others get an error."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What calls led to, one after another."""

    results: list[str]
    state: Any


def start(environment: Mapping[str, Any]) -> Environment:
    """A fresh environment of a row's `environment`: its `kind`, and what it starts from.

    Raises:
        RewardError: no such kind, or a start that it cannot have.
    """
    kind = str(environment.get("kind"))
    if kind not in KINDS or environment.keys() - {"kind", "start"}:
        raise RewardError(
            f"a row's `environment` is {{'kind': one of {', '.join(KINDS)}, 'start': ...}}, but it "
            f"is {shown(environment)}"
        )
    return KINDS[kind](environment.get("start"))


def replay(environment: Mapping[str, Any], calls: Sequence[Call]) -> Replay:
    """Make the calls in a fresh environment."""
    world = start(environment)
    results = [
        use(world, str(call.get("name")), call.get("arguments", {}))
        if number < MAX_CALLS
        else f"error: more than {MAX_CALLS} calls"
        for number, call in enumerate(calls)
    ]
    return Replay(results, world.state())


def tools_of(kind: str) -> list[dict[str, Any]]:
    """The tools of an environment as prompts show them: name, description, parameters."""
    return [_shown(name, tool) for name, tool in KINDS[kind].TOOLS.items()]


def _shown(name: str, tool: Tool) -> dict[str, Any]:
    return {"name": name, "description": tool.description, "parameters": tool.parameters}


__all__ = [
    "KINDS",
    "MAX_CALLS",
    "Call",
    "Environment",
    "Replay",
    "replay",
    "start",
    "tools_of",
    "use",
]
