"""A domain's tools at work: whatever one of them does, it answers with text and in time."""

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.domains.config import ToolConfig
from posttrain.domains.objects import import_object
from posttrain.domains.rows import shown
from rewards.failures import Failures

logger = logging.getLogger(__name__)


class Tool(Protocol):
    """`get("get", {"key": "qfz"}, table={...}) -> "37"`."""

    def __call__(self, name: str, arguments: dict[str, Any], /, **row: Any) -> str: ...


class Toolbox:
    """The tools of a domain: `Toolbox(spec.tools, folder).run("get", {"key": "qfz"}, row.fields)`.

    What a tool raises, its silence, and a call of no tool are answers like any other, `error: ...`:
    the model can mend them.
    """

    def __init__(self, tools: Sequence[ToolConfig], folder: Path) -> None:
        """Import the tools. Raises RecipeError where one cannot be."""
        self._made_of = list(tools), folder
        self._tools = {tool.name: _Bound.load(tool, folder) for tool in tools}
        self.failures = Failures()
        """How many calls of a tool failed, by kind: raised, timeout."""

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process the tools go by name: they are imported there, and what fails there
        is counted there."""
        return type(self), self._made_of

    def __bool__(self) -> bool:
        return bool(self._tools)

    def run(self, name: str, arguments: dict[str, Any], fields: Mapping[str, Any]) -> str:
        """The tool's text, or `error: ...`; `fields` are the row's."""
        if name not in self._tools:
            return f"error: no tool {name!r}, there is {', '.join(self._tools)}"
        tool = self._tools[name]
        future = tool.start(arguments, fields)
        try:
            error = future.exception(tool.timeout_s)
        except TimeoutError:
            return self._failed(
                "timeout", name, arguments, f"no answer within {tool.timeout_s:g} s"
            )
        if error is not None:
            return self._failed("raised", name, arguments, f"{type(error).__name__}: {error}")
        return future.result()

    def close(self) -> None:
        """Log how many calls failed."""
        self.failures.log_counts(f"calls of {', '.join(self._tools)} that failed", logger)

    def _failed(self, kind: str, name: str, arguments: dict[str, Any], reason: str) -> str:
        message = f"tool {name!r} failed ({kind}) on {shown(arguments)}: {reason}"
        self.failures.add(kind, message, logger)
        return f"error: {reason}"


@dataclass(frozen=True)
class _Bound:
    """A tool with what its calls need to know."""

    name: str
    function: Tool
    timeout_s: float
    takes_all: bool
    """Whether it takes fields that its parameters do not name."""
    named: frozenset[str]
    """Parameters beside the call's name and arguments."""
    reserved: frozenset[str]
    """What its first two parameters are called."""

    @classmethod
    def load(cls, tool: ToolConfig, folder: Path) -> "_Bound":
        function = import_object(tool.python, folder)
        parameters = list(inspect.signature(function).parameters.values())
        return cls(
            tool.name,
            function,
            tool.timeout_s,
            takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
            named=frozenset(p.name for p in parameters[2:]),
            reserved=frozenset(p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD),
        )

    def start(self, arguments: dict[str, Any], fields: Mapping[str, Any]) -> Future[str]:
        """Call it in a thread of its own, which is left behind if it hangs."""
        given = {
            key: value
            for key, value in fields.items()
            if key in self.named or (self.takes_all and key not in self.reserved)
        }
        future: Future[str] = Future()

        def call() -> None:
            try:
                future.set_result(str(self.function(self.name, arguments, **given)))
            except BaseException as error:  # noqa: BLE001  # a tool's failure is the model's to mend
                future.set_exception(error)

        threading.Thread(target=call, name=f"tool {self.name}", daemon=True).start()
        return future
