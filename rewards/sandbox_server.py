"""The sandbox's own process: a warm fork server, started and driven by `rewards.sandbox.Sandbox`.

    server (trusted; namespaces of its own) -> first process of a run (trusted) -> the program

Requests and replies are JSON behind a length, on stdin and stdout; the first reply says which level
was reached. Each request runs one program in a process forked for it, which holds neither those
pipes nor anything to win: what its calls gave is judged where the expected values are, outside.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards import confinement
from rewards.wire import read_frame, write_frame

PRELOADED = (
    *("array", "ast", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses"),
    *("datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io"),
    *("itertools", "json", "math", "operator", "random", "re", "statistics", "string"),
    *("textwrap", "time", "types", "typing", "unicodedata"),
)
"""Imported before the first run, so that no run pays for it."""

RESULTS = 3
"""The descriptor on which a program's process tells what its calls gave."""

MAX_CHARACTERS = 100_000
"""Of one result: more than a literal may have."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fence:
    """What this machine allows: `Fence("namespaces", own_namespace=7)`. Descriptors; -1: none."""

    level: str
    own_namespace: int = -1
    """The server's process id namespace, to come back to."""
    rules: int = -1
    """Landlock's."""

    @property
    def is_apart(self) -> bool:
        return self.level == "namespaces"


def main(highest: str = "namespaces") -> None:
    """Serve at the best level up to `highest` that the kernel allows, until requests end."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    os.environ.clear()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)  # the soft one is the grader's, for an item
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)]
    why = "not tried"
    if highest == "namespaces":
        why = _in_namespaces(requests, replies)
        if why is None:
            return
    problem = "not tried" if highest == "limits" else confinement.refuses(_try_landlock)
    level = "limits" if problem else "landlock"
    rules = confinement.read_only_rules() if level == "landlock" else -1
    _send(replies, {"level": level, "why": f"namespaces: {why}; landlock: {problem or 'yes'}"})
    gc.freeze()
    gc.disable()
    _serve(requests, replies, Fence(level, rules=rules))


def _in_namespaces(requests: int, replies: int) -> str | None:
    """Serve in namespaces until there are no more requests; why not, where the kernel refuses."""
    told, tell = os.pipe()
    mapped, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.close(go)
        _first(lambda: _serve_apart(requests, replies, tell, mapped), tell)
    os.close(tell)
    os.close(mapped)
    with contextlib.suppress(OSError):
        if os.read(told, 1) == b"+":
            confinement.map_users(pid)
            os.write(go, b"+")
    why = b""
    while part := os.read(told, 4096):
        why += part
    os.close(told)
    os.close(go)
    if why != b"+":
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return why.decode() or "the namespaces' users cannot be set"
    os.close(requests)
    os.close(replies)
    os.waitpid(pid, 0)
    return None


def _first(action: Callable[[], object], tell: int) -> NoReturn:
    try:
        action()
    except OSError as error:
        os.write(tell, str(error.strerror or error).encode())
    finally:
        os._exit(0)


def _serve_apart(requests: int, replies: int, tell: int, mapped: int) -> None:
    confinement.unshare(confinement.APART)
    os.write(tell, b"+")
    if os.read(mapped, 1) != b"+":
        raise OSError("the namespaces' users cannot be set")
    confinement.die_with_parent()
    proc = os.open("/proc", os.O_PATH)
    confinement.enter_empty_root()
    server = os.fork()  # the first process of the new process id namespace
    if server:
        for descriptor in (requests, replies, tell, proc):
            os.close(descriptor)
        os.waitpid(server, 0)
        return
    confinement.die_with_parent()
    own_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)
    os.close(proc)
    confinement.unshare(confinement.CLONE_NEWPID)
    confinement.back_to(own_namespace)
    gc.freeze()
    gc.disable()
    confinement.filter_program(2)  # made once: a program is the second process of its namespace
    os.write(tell, b"+")
    os.close(tell)
    _send(replies, {"level": "namespaces", "why": ""})
    _serve(requests, replies, Fence("namespaces", own_namespace=own_namespace))


def _try_landlock() -> None:
    """In a child, since there is no way back."""
    pid = os.fork()
    if pid == 0:
        problem = confinement.refuses(
            lambda: _lock(Fence("landlock", rules=confinement.read_only_rules()))
        )
        os._exit(1 if problem else 0)
    _, status = os.waitpid(pid, 0)
    if status:
        raise OSError("no landlock or no seccomp")


def _lock(fence: Fence) -> None:
    confinement.drop_privileges()
    if fence.rules >= 0:
        confinement.obey(fence.rules)
    with contextlib.ExitStack() as stack:
        if fence.level == "limits":
            stack.enter_context(contextlib.suppress(OSError))
        confinement.seccomp()


def _serve(requests: int, replies: int, fence: Fence) -> None:
    with os.fdopen(requests, "rb") as given:
        while (frame := read_frame(given)) is not None:
            _send(replies, _execute(json.loads(frame), fence))


def _send(replies: int, reply: Json) -> None:
    write_frame(replies, json.dumps(reply).encode())


def _execute(request: Json, fence: Fence) -> Json:
    limits = request["limits"]
    printed, told = os.pipe(), os.pipe()
    started = time.monotonic()
    if fence.is_apart:
        confinement.unshare(confinement.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        try:
            _begin(request, fence, printed[1], told[1])
        finally:
            os._exit(99)
    if fence.is_apart:
        confinement.back_to(fence.own_namespace)
    os.close(printed[1])
    os.close(told[1])
    found = {printed[0]: bytearray(), told[0]: bytearray()}
    end = _collect(found, started + limits["wall_s"], limits["output_kb"] * 1024)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # with its namespace, if it has one
    _, status = os.waitpid(pid, 0)
    for descriptor in found:
        os.close(descriptor)
    if end == "ended":
        end = _how(status)
    stdout, results = (bytes(data).decode("utf-8", "replace") for data in found.values())
    seconds = time.monotonic() - started
    return {"end": end, "stdout": stdout, "results": results, "seconds": seconds}


def _collect(found: Mapping[int, bytearray], deadline: float, max_bytes: int) -> str:
    """Read until all ends are closed, the deadline, or too much."""
    poll = select.poll()
    for descriptor in found:
        poll.register(descriptor, select.POLLIN)
    num_open = len(found)
    while num_open:
        left = deadline - time.monotonic()
        ready = poll.poll(left * 1000) if left > 0 else []
        if not ready:
            return "timeout"
        for descriptor, _ in ready:
            data = os.read(descriptor, 1 << 16)
            found[descriptor].extend(data)
            if len(found[descriptor]) > max_bytes:
                del found[descriptor][max_bytes:]
                return "output"
            if not data:
                poll.unregister(descriptor)
                num_open -= 1
    return "ended"


def _how(status: int) -> str:
    """How a run ended whose pipes are closed; the first process passes a signal on as 128 + n."""
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else code - 128
    if number > 0 and number != signal.SIGKILL:
        return f"died of {signal.Signals(number).name}"
    return "killed" if number == signal.SIGKILL else "ended"


def _begin(request: Json, fence: Fence, printed: int, told: int) -> None:
    """In the forked process: fence it in, then run the program."""
    os.setsid()
    limits = request["limits"]
    if fence.is_apart:
        confinement.private_tmp(limits["file_mb"])
        pid = os.fork()
        if pid:
            # It keeps the pipes' ends: once they are closed, how the program ended is known.
            _, status = os.waitpid(pid, 0)
            os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    given = os.memfd_create("stdin")
    os.write(given, request["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    ends = [os.dup(given), os.dup(printed), os.open(os.devnull, os.O_WRONLY), os.dup(told)]
    high = [os.dup2(end, 1000 + place) for place, end in enumerate(ends)]
    for place, end in enumerate(high):
        os.dup2(end, place)
    if fence.rules >= 0:
        fence = Fence(fence.level, rules=os.dup2(fence.rules, len(ends)))
    os.closerange(len(ends) + (fence.rules >= 0), 1 << 16)
    os.chdir("/tmp" if fence.is_apart else "/")
    # A user's other processes count as threads do, and at this level they are this one's too.
    is_shared = fence.level == "landlock" and os.geteuid() != 0
    confinement.limit(
        **({} if is_shared else {"NPROC": limits["num_threads"]}),
        CPU=int(limits["wall_s"]) + 1,
        AS=limits["memory_mb"] << 20,
        FSIZE=limits["file_mb"] << 20,
        NOFILE=64,
        CORE=0,
        MEMLOCK=0,
    )
    _lock(fence)
    _run(request["program"], request["calls"])


def _run(program: str, calls: Sequence[str]) -> NoReturn:
    """The untrusted part. With calls the program is a module; without, it is the main one."""
    gc.enable()
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    module = types.ModuleType("answer" if calls else "__main__")
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "<answer>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is data
        _tell("!", type(error).__name__)
        calls = ()
    for call in calls:
        try:
            _tell("=", repr(eval(call, module.__dict__)))
        except BaseException as error:  # noqa: BLE001 - the same
            _tell("!", type(error).__name__)
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0)


def _tell(kind: str, text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        kind, text = "!", f"more than {MAX_CHARACTERS} characters"
    rest = memoryview(f"{kind}{json.dumps(text)}\n".encode())
    while rest:
        rest = rest[os.write(RESULTS, rest) :]
