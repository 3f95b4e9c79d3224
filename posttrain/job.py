"""What a stage's `work(config, job)` gets besides its config, and the roles it may call.

A role is a plain class, `TeacherPool(**kwargs)`, that lives in this process or in another one: the
same call gives the same value either way, `job.role("distill.teachers:TeacherPool", {...})`.
"""

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future as DoneFuture
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.metrics import Metrics


class Future(Protocol):
    """The value of a role's method, now or later."""

    def result(self, timeout_s: float) -> Any:
        """The value; arrays in it may be read-only. Raises what the method raised, TimeoutError
        after `timeout_s` seconds, or RoleLost."""
        ...


class RoleHandle(Protocol):
    """A role somewhere: calls are served one at a time, in order."""

    def call(self, method: str, *args: Any) -> Future:
        """Start `method(*args)`."""
        ...


class RoleLost(RuntimeError):
    """The process that held a role died; the stage may go on from its folder, with a new one."""


class LocalFuture:
    """A value that is there already, or the error that came instead."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._done: DoneFuture[Any] = DoneFuture()
        try:
            self._done.set_result(compute())
        except Exception as error:  # noqa: BLE001  # raised by result(), as a remote role's error is
            self._done.set_exception(error)

    def result(self, timeout_s: float) -> Any:
        """The value, or raises the method's error; never waits."""
        return self._done.result(timeout_s)


class LocalRole:
    """A role in this process; a call computes at once."""

    def __init__(self, path: str, kwargs: Mapping[str, Any]) -> None:
        self._role = load_attribute(path)(**kwargs)

    def call(self, method: str, *args: Any) -> LocalFuture:
        """Compute `method(*args)` now; its error is raised by the future's `result`."""
        return LocalFuture(lambda: getattr(self._role, method)(*args))


def load_attribute(path: str) -> Any:
    """`"distill.opd:work"` -> the function. Raises ImportError or AttributeError: our mistakes."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Job:
    """Where a stage works: `Job(out, {"start": .../sft.mathematics-1a2b}, folder, seed=0, ...)`."""

    out: Path
    """The stage's partial folder; `work` fills it, and goes on from what a killed attempt left."""

    inputs: Mapping[str, Path]
    """Finished stages' folders by role; each that made a model holds `checkpoint/`."""

    folder: Path
    """The recipe's folder: data paths and the user's modules are relative to it."""

    seed: int
    num_threads: int
    metrics: Metrics

    place: Callable[[str, dict[str, Any]], RoleHandle] | None = None
    """Puts a role into another process; None: roles live in this one."""

    num_places: int = 1
    """Processes that roles can be in: as many roles, made one after another, share none."""

    def role(self, path: str, kwargs: dict[str, Any]) -> RoleHandle:
        """A role made by `"module:Class"(**kwargs)`, in another process where there is one."""
        return self.place(path, kwargs) if self.place else LocalRole(path, kwargs)
