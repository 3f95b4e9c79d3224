"""math-verify in a process of its own, with a bound on the time and memory of each question.

    Verifier().equal("x^2+2x+1", "(x+1)^2") is True

`python -m rewards.verifier` is that process: it imports sympy once, then forks. The fork answers;
one that is late or out of memory is killed, and the next one forked in milliseconds. math-verify's
own time limits are signals, which only a main thread can have, so they are off.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import resource
import select
import signal
import sys
import threading
from typing import Any, cast

from rewards.process import START_TIMEOUT_S, WorkerDied, WorkerProcess
from rewards.wire import read_frame, send_json, write_frame

PROCESSOR_S = 1.0
"""Processor time of one question."""
TIMEOUT_S = 4.0
"""Wall time, on a machine that is busy."""
MEMORY_GB = 2.0
GRACE_S = 10.0


class NoVerdict(Exception):
    """The question took too long or too much; the message says which."""


class Verifier:
    """The process and the way to it. Threads may share it: they take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: WorkerProcess | None = None

    def start(self) -> None:
        """Have the process ready (a second or more) before the clock of a question starts."""
        with self._lock:
            self._ready()

    def equal(self, gold: str, found: str) -> bool:
        """Whether two LaTeX expressions are the same value. NoVerdict where that takes too long."""
        with self._lock:
            try:
                process = self._ready()
                process.send((gold, found))
                reply = process.receive(TIMEOUT_S + GRACE_S)
            except (TimeoutError, WorkerDied) as error:
                self._stop()
                raise NoVerdict(f"math-verify gave none: {error}") from error
            except BaseException:  # Ctrl-C, say: this reply must not meet the next question
                self._stop()
                raise
        if "problem" in reply:
            raise NoVerdict(reply["problem"])
        return reply["equal"]

    def close(self) -> None:
        """End the process; a later question starts another."""
        with self._lock:
            self._stop()

    def _ready(self) -> WorkerProcess:
        if self._process is None or not self._process.is_alive():
            self._stop()
            self._process = WorkerProcess(None, module="rewards.verifier")
            self._process.receive(START_TIMEOUT_S)
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


_SHARED: dict[int, Verifier] = {}
_SHARED_LOCK = threading.Lock()


def shared() -> Verifier:
    """This process's verifier."""
    with _SHARED_LOCK:
        return _SHARED.setdefault(os.getpid(), Verifier())


@atexit.register
def _close_shared() -> None:
    if os.getpid() in _SHARED:
        _SHARED[os.getpid()].close()


# The process's own side

WARM_UP = (
    *(("x^2+2x+1", "(x+1)^2"), ("\\{1,2\\}", "\\{2,1\\}"), ("[0,1)", "(0,1)"), ("x=3", "3")),
    *(("\\frac{\\pi}{2}", "1.5"), ("\\sqrt{8}", "2\\sqrt{2}"), ("(1,2)", "(1, 3)")),
    *(("2+3i", "3i+2"), ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "1"), ("y=2x+1", "y-2x=1")),
)
"""So that no question pays for what sympy loads when it is first used."""


def _equal(gold: str, found: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    targets, no_limit = [LatexExtractionConfig()], cast("int", None)  # as its own warning says
    wanted, given = (
        parse(f"\\boxed{{{text}}}", targets, parsing_timeout=no_limit) for text in (gold, found)
    )
    return bool(wanted and given and verify(wanted, given, timeout_seconds=None))


def _answer(questions: int, answers: int) -> None:
    """The fork's life."""
    num_bytes = int(MEMORY_GB * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    with os.fdopen(questions, "rb") as given, os.fdopen(answers, "wb") as told:
        while (frame := read_frame(given)) is not None:
            gold, found = pickle.loads(frame)
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)  # SIGPROF ends the process
            try:
                send_json(told, {"equal": _equal(gold, found)})
            except MemoryError:
                send_json(told, {"problem": f"needs more than {MEMORY_GB:g} GB"})
                return  # what is left of the memory is in an unknown state
            except Exception as error:  # noqa: BLE001 - math-verify's failures are answers
                send_json(told, {"problem": f"math-verify raised {type(error).__name__}"})


class _Fork:
    """One answering process."""

    def __init__(self) -> None:
        their_questions, self._questions = os.pipe()
        self._answers, their_answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._questions)
                os.close(self._answers)
                _answer(their_questions, their_answers)
            finally:
                os._exit(0)
        os.close(their_questions)
        os.close(their_answers)

    def ask(self, frame: bytes) -> bytes:
        """The answer's line; empty if it comes late or not at all."""
        with contextlib.suppress(BrokenPipeError):
            write_frame(self._questions, frame)
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(TIMEOUT_S * 1000):
                return b""
            part = os.read(self._answers, 1 << 12)
            if not part:
                return b""
            line += part
        return line

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._questions)
        os.close(self._answers)


def main() -> None:
    replies: Any = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)  # the soft one is the grader's, for an item
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
    for gold, found in WARM_UP:
        _equal(gold, found)
    send_json(replies, {"ready": True})
    fork = _Fork()
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        line = fork.ask(frame)
        if not line or b'"problem": "needs' in line:
            fork.end()
            fork = _Fork()
        late = {"problem": f"takes longer than {PROCESSOR_S:g} s or ends its process"}
        send_json(replies, late) if not line else replies.write(line)
        replies.flush()
    fork.end()


if __name__ == "__main__":
    main()
