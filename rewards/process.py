"""The grader's end of a grading process: start it, write to it, read from it, never for ever."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from rewards.wire import HEADER

START_TIMEOUT_S = 120.0
"""For imports of a user's module, which may bring torch, on a busy machine."""


class WorkerDied(Exception):
    """The grading process ended by itself; the message says how."""


class WorkerProcess:
    """One `python -m rewards.worker` (or another module) in a session of its own. One thread at a
    time may use it."""

    def __init__(self, folder: Path | None, *, module: str = "rewards.worker") -> None:
        self._process = subprocess.Popen(
            # -P: the current folder may hold a stranger called `rewards`; -u: prints reach the log.
            [sys.executable, "-P", "-u", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            cwd=folder,
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _kill, self._process, os.getpid())
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._replies = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        self._lines: deque[bytes] = deque()
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: object) -> None:
        """One frame; TimeoutError or WorkerDied if the process does not take it."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        rest = memoryview(HEADER.pack(len(body)) + body)
        deadline = time.monotonic() + START_TIMEOUT_S
        while rest:
            self._await(self._requests, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._requests, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise WorkerDied(self._how_it_died()) from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next reply; TimeoutError after `timeout_s` seconds, WorkerDied at the end."""
        deadline = time.monotonic() + timeout_s
        while not self._lines:
            self._await(self._replies, select.POLLIN, deadline)
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise WorkerDied(self._how_it_died())
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
        return json.loads(self._lines.popleft())

    def close(self) -> None:
        """Kill it, with what the rewards have started; it holds nothing worth saving."""
        self._finalizer()

    def _await(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()  # not select(), which ends at descriptor 1,023
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    def _how_it_died(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the grading process closed its pipe"
        if code < 0:
            return f"the grading process died of {signal.Signals(-code).name}"
        return f"the grading process exited with code {code}"


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner ends here; the process is not its own
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _environment() -> dict[str, str]:
    """The caller's, without Ray's (its token would let a reward drive the cluster)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.setdefault("PYTHONHASHSEED", "0")  # the order of a set, the same in every run
    environment.setdefault("OMP_NUM_THREADS", "1")
    home = Path(__file__).resolve().parent.parent
    if home.name not in {"site-packages", "dist-packages"}:  # those are on the path, after Python's
        paths = [str(home), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment
