"""Sandboxes of every level that this machine reaches, and what programs come to in them."""

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from rewards.confinement import MACHINES
from rewards.sandbox import LEVELS, Level, Limits, Sandbox

PER_LINUX32 = 8
"""uname then calls the machine i686."""

SHORT = Limits(wall_s=1.0, memory_mb=256)


def reached() -> Level:
    with Sandbox(lowest="limits") as sandbox:
        return sandbox.level


REACHED = LEVELS.index(reached())


@contextmanager
def sandbox_of(level: Level) -> Generator[Sandbox]:
    """A sandbox of this level and no better one."""
    if LEVELS.index(level) > REACHED:
        pytest.skip(f"this machine does not reach the level {level}")
    with Sandbox(lowest=level, highest=level) as sandbox:
        assert sandbox.level == level
        yield sandbox


@contextmanager
def without_filter() -> Generator[None]:
    """Sandboxes that start inside find a machine for which there is no filter of system calls, and
    reach limits alone: its name, as uname tells it, is another."""
    personality = ctypes.CDLL(None).personality
    before = personality(0xFFFFFFFF)
    personality(PER_LINUX32)
    try:
        if os.uname().machine in MACHINES:
            pytest.skip("this machine keeps its name")
        yield
    finally:
        personality(before)


def values(sandbox: Sandbox, program: str, *calls: str) -> list[str]:
    """What the calls give, by repr; an exception by its name with a mark in front."""
    run = sandbox.run(program, calls=calls, limits=SHORT)
    return [f"!{result.error}" if result.error else result.text for result in run.results]


def attempt(sandbox: Sandbox, body: str) -> str:
    """What one statement list comes to: "done", or the exception that stopped it."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (found,) = values(sandbox, f"def attempt():\n{lines}\n    return 'done'", "attempt()")
    return found.strip("'")
