"""A key-value store of texts: `{"city": "Oslo"}` to start with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rewards.environments.base import Tool, ToolError, given, is_text, text

MAX_KEYS = 1_000

KEY = text("The key.", minLength=1, maxLength=200)


class Store:
    """Keys and values are texts."""

    def __init__(self, start: object) -> None:
        self._values: dict[str, str] = given(start, is_text, what="keys and texts")

    def get(self, key: str) -> str:
        return self._values[self._there(key)]

    def put(self, key: str, value: str) -> str:
        if key not in self._values and len(self._values) >= MAX_KEYS:
            raise ToolError(f"there are {MAX_KEYS} keys already")
        self._values[key] = value
        return "set"

    def delete(self, key: str) -> str:
        del self._values[self._there(key)]
        return "deleted"

    def keys(self, prefix: str = "") -> str:
        found = sorted(key for key in self._values if key.startswith(prefix))
        return "\n".join(found) or "no key"

    def state(self) -> dict[str, str]:
        return dict(self._values)

    def _there(self, key: str) -> str:
        if key not in self._values:
            raise ToolError(f"no key {key!r}")
        return key

    TOOLS: ClassVar[Mapping[str, Tool]] = {
        "get": Tool("The value under a key.", {"key": KEY}, get),
        "set": Tool("Put a value under a key.", {"key": KEY, "value": text("The value.")}, put),
        "delete": Tool("Remove a key.", {"key": KEY}, delete),
        "keys": Tool("The keys there are.", {"prefix": text("Of these only.", default="")}, keys),
    }
