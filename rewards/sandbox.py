"""Code that a model wrote, run where it can do no harm, and judged where it cannot reach.

    with Sandbox() as sandbox:
        run = sandbox.run("def f(x): return x + 1", calls=["f(1)", "f(2)"])
    run.results == [Result("2"), Result("3")]

A program sees an empty environment, the standard library, an empty /tmp of its own, and nothing
else: no network, no other process, no file of this machine. Expected values never enter, so there
is nothing to read; exit codes and what is printed count for nothing but as output. The levels, best
first, and what keeps the program in:

    namespaces   user, mount, process, network and ipc namespaces, seccomp, resource limits
    landlock     landlock (it can write no file at all), seccomp, resource limits
    limits       resource limits, and seccomp where there is a filter for the machine

All are reached without privileges. A level below the one asked for is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from rewards.score import RewardError
from rewards.wire import HEADER, write_frame

Level = Literal["namespaces", "landlock", "limits"]
LEVELS: tuple[Level, ...] = ("limits", "landlock", "namespaces")
"""From the weakest."""

SERVER = "rewards.sandbox_server"

START_S = 60.0
STOP_S = 1.0
GRACE_S = 10.0
"""How much longer than a run's own limit its answer is waited for, on a busy machine."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take: `Limits(wall_s=2.0)`. Of processes it may have one."""

    wall_s: float = 2.0
    """Seconds from its start, the wait for a processor included."""
    memory_mb: int = 512
    """Address space, the interpreter's own 50 MB included."""
    file_mb: int = 16
    """All of its files together."""
    output_kb: int = 256
    """What it prints, and the results of its calls, each."""
    num_threads: int = 16


@dataclass(frozen=True, slots=True)
class Result:
    """What a call gave: `Result("[1, 2]")`, or `Result("", error="ValueError")`."""

    text: str
    """As repr writes it: untrusted, to be read as a literal, never evaluated."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: `Run("ended", [Result("3")], stdout="", seconds=0.004)`."""

    end: str
    """ended, timeout, output (too much of it), killed, or "died of SIGSEGV"."""
    results: list[Result] = field(default_factory=list[Result])
    """One for each call that was finished."""
    stdout: str = ""
    seconds: float = 0.0


class SandboxError(RewardError):
    """No sandbox of the level that was asked for can be had here."""


class Sandbox:
    """A fork server and the way to it. Threads may share it: they take turns.

    Raises:
        SandboxError: the kernel allows less than `lowest`.
    """

    def __init__(self, *, lowest: Level = "namespaces", highest: Level = "namespaces") -> None:
        """`highest` is for looking at what a weaker machine would have."""
        if lowest not in LEVELS:
            raise SandboxError(f"sandbox {lowest!r} is none of {', '.join(reversed(LEVELS))}")
        self._lowest = lowest
        self._highest = highest
        self._lock = threading.Lock()
        self._start()

    def run(
        self,
        program: str,
        *,
        calls: Sequence[str] = (),
        stdin: str = "",
        limits: Limits = Limits(),
    ) -> Run:
        """Run the program, then evaluate the calls, expressions in its names, one after another.

        Without calls it runs as the main program on `stdin`.
        """
        request = {
            "program": program,
            "calls": list(calls),
            "stdin": stdin,
            "limits": asdict(limits),
        }
        with self._lock:
            reply = self._ask(request, limits) or self._ask(request, limits)
        if reply is None:
            return Run("killed")
        results = _read_results(reply["results"])[: len(calls)]
        return Run(reply["end"], results, reply["stdout"], reply["seconds"])

    def close(self) -> None:
        """End the server, and with it whatever runs."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        home = str(Path(__file__).resolve().parent.parent)
        source = f"import sys; sys.path.append({home!r}); import {SERVER} as server"
        # No site: what is installed is not the program's business. The order of sets is the same
        # in every run.
        command = [
            sys.executable,
            "-s",
            "-S",
            "-P",
            "-c",
            f"{source}; server.main({self._highest!r})",
        ]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _stop, self._process, os.getpid())
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._replies = self._process.stdout.fileno()
        try:
            reached = self._receive(START_S)
        except (OSError, EOFError) as error:
            self.close()
            raise SandboxError(f"the sandbox's process did not start: {error!r}") from error
        self.level: Level = reached["level"]
        if LEVELS.index(self.level) < LEVELS.index(self._lowest):
            self.close()
            raise SandboxError(
                f"untrusted code is to run at the level {self._lowest!r}, and this machine allows "
                f"{self.level!r} only ({reached['why']}): allow user namespaces, or accept that "
                f"level by name (`sandbox: {self.level}` among the reward's options)"
            )

    def _ask(self, request: dict[str, Any], limits: Limits) -> dict[str, Any] | None:
        """The reply; None where the server ended, or does not answer, and a new one is there."""
        try:
            self._send(request)
            return self._receive(limits.wall_s + GRACE_S)
        except (OSError, EOFError):  # TimeoutError is one too
            self._restart()
            return None
        except BaseException:  # Ctrl-C, say: this answer must not meet the next question
            self._restart()
            raise

    def _restart(self) -> None:
        self.close()
        self._start()

    def _send(self, request: dict[str, Any]) -> None:
        write_frame(self._requests, json.dumps(request).encode())

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
        return json.loads(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        while size:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("no answer in time")
            part = os.read(self._replies, size)
            if not part:
                raise EOFError("it ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _read_results(text: str) -> list[Result]:
    """The lines a program's process wrote. It may have written anything."""
    results: list[Result] = []
    for line in text.split("\n"):
        if line[:2] not in ('="', '!"'):
            continue
        with contextlib.suppress(ValueError):
            value = json.loads(line[1:])
            results.append(Result(value) if line[0] == "=" else Result("", error=value[:80]))
    return results


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner ends here; the process is not its own
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=STOP_S)  # for want of requests
    except subprocess.TimeoutExpired:
        process.kill()  # a run is going on; its processes die with it, by the kernel
        process.wait()


_SHARED: dict[tuple[int, Level], Sandbox] = {}
_SHARED_LOCK = threading.Lock()


def shared(lowest: Level = "namespaces") -> Sandbox:
    """This process's sandbox of at least that level, started when it is first asked for."""
    with _SHARED_LOCK:
        key = (os.getpid(), lowest)
        if key not in _SHARED:
            _SHARED[key] = Sandbox(lowest=lowest)
        return _SHARED[key]


@atexit.register
def _close_shared() -> None:
    for (owner, _), sandbox in _SHARED.items():
        if owner == os.getpid():
            sandbox.close()
