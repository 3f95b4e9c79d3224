"""Attacks on the sandbox, and what honest programs need of it."""

import itertools
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sandboxes import attempt, values

from rewards.confinement import CLONE3, MACHINES, REFUSED
from rewards.sandbox import Limits, Result, Sandbox, SandboxError, shared

# What honest programs need


def test_calls_see_the_program_and_each_other(sandbox: Sandbox) -> None:
    program = "import math, heapq\ndef f(x, n=[]):\n    n.append(x)\n    return n, math.sqrt(x)"
    run = sandbox.run(program, calls=["f(4)", "f(9)", "f('a')", "g", "[i for i in range(3)]"])
    assert run.end == "ended"
    assert run.results == [
        Result("([4], 2.0)"),
        Result("([4, 9], 3.0)"),
        Result("", error="TypeError"),
        Result("", error="NameError"),
        Result("[0, 1, 2]"),
    ]


def test_a_main_program_reads_and_prints(sandbox: Sandbox) -> None:
    program = "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))\nexit()"
    numbers = "\n".join(map(str, range(20_000)))
    assert sandbox.run("print(input() + '\u00e9')", stdin="\ud55c\n").stdout == "\ud55c\u00e9\n"
    run = sandbox.run(program.replace("exit()", "sys.exit(3)"), stdin=numbers)
    assert (run.end, run.stdout) == ("ended", f"{sum(range(20_000))}\n")


def test_dataclasses_threads_and_recursion_work(sandbox: Sandbox) -> None:
    program = """
import dataclasses, threading, typing
@dataclasses.dataclass
class P:
    x: int
    y: typing.List[int] = dataclasses.field(default_factory=list)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
def threads():
    found = []
    workers = [threading.Thread(target=found.append, args=(i,)) for i in range(4)]
    [w.start() for w in workers]; [w.join() for w in workers]
    return sorted(found)
"""
    calls = ["P(1).x", "deep(900)", "threads()"]
    assert values(sandbox, program, *calls) == ["1", "900", "[0, 1, 2, 3]"]


def test_all_of_the_standard_library_can_be_imported_in_namespaces(sandbox: Sandbox) -> None:
    if sandbox.level != "namespaces":
        pytest.skip("an interpreter in a home folder may be out of the user nobody's sight")
    program = "import asyncio, sqlite3, ssl, zlib\nasync def later(): return 5"
    assert values(sandbox, program, "asyncio.run(later())") == ["5"]


def test_the_order_of_a_set_is_the_same_in_every_run_and_every_sandbox(sandbox: Sandbox) -> None:
    program = "def f(): return list({str(i) for i in range(50)})"
    with Sandbox(lowest="limits") as other:
        assert values(sandbox, program, "f()") == values(other, program, "f()")


def test_one_run_leaves_nothing_for_the_next(sandbox: Sandbox) -> None:
    values(sandbox, "import math; math.pi = 3\nimport builtins; builtins.len = lambda x: 7", "1")
    assert values(sandbox, "import math", "math.pi > 3.1", "len([])") == ["True", "0"]
    if sandbox.level == "namespaces":
        write = "import os\nopen('/tmp/left', 'w').write('x')\nhere = os.listdir('/tmp')"
        assert values(sandbox, write, "here") == ["['left']"]
        assert values(sandbox, "import os", "os.listdir('/tmp')", "os.getcwd()") == ["[]", "'/tmp'"]


# Bombs


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "9**9**9",
        "import time; time.sleep(60)",
        "x = 'a' * 10**7\nimport re; re.match('(a|a)*b', 'a' * 40)",
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except Exception: pass\nwhile True: pass",
        "import signal\nsignal.setitimer = None\nwhile True:\n  try:\n    while True: pass\n"
        "  except BaseException: pass",
        "import threading\ndef f():\n  while True: pass\n"
        "[threading.Thread(target=f).start() for _ in range(4)]",
    ],
    ids=["loop", "power", "sleep", "regex", "ignored signals", "catches all", "threads left"],
)
def test_what_never_ends_is_ended(sandbox: Sandbox, program: str) -> None:
    start = time.monotonic()
    run = sandbox.run(program, calls=["1"], limits=Limits(wall_s=0.4))
    assert run.end == "timeout"
    assert time.monotonic() - start < 5.0
    assert values(sandbox, "", "2") == ["2"]


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("x = bytearray(2**31)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
        ("import mmap; x = mmap.mmap(-1, 2**31)", "OSError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.posix_spawn('/bin/true', ['true'], {})", "PermissionError"),
        ("import os; os.execv('/usr/lib/x', ['x'])", "PermissionError"),
        ("import multiprocessing as m; m.Process(target=int).start()", "Error"),
        (
            "import threading, time\nfor _ in range(99999): threading.Thread("
            "target=time.sleep, args=(9,)).start()",
            "RuntimeError",
        ),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = [open('/dev/null') for _ in range(9999)]", "OSError"),
        ("import os; os.memfd_create('x')", "PermissionError"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_bombs_run_into_a_limit(sandbox: Sandbox, program: str, error: str) -> None:
    run = sandbox.run(program, calls=["1"], limits=Limits(wall_s=3.0, memory_mb=256))
    told = run.results[0].error if run.results else run.end
    # Threads may outlive the error; a library in a home folder may be out of nobody's sight.
    assert error in told or run.end == "timeout" or told == "ModuleNotFoundError"
    assert not any(result.text for result in run.results)
    assert values(sandbox, "", "2") == ["2"]


@pytest.mark.parametrize(
    "program",
    [
        "print('x' * 200_000_000)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import os\nwhile True: os.write(3, b'=\"1\"\\n' * 9999)",
        "x = 'a' * 10**8",
    ],
    ids=["print", "stdout", "results", "value"],
)
def test_a_flood_is_cut(sandbox: Sandbox, program: str) -> None:
    run = sandbox.run(program, calls=["x"], limits=Limits(wall_s=3.0))
    assert run.end in ("output", "ended", "timeout")  # on a busy machine
    assert len(run.stdout) <= 256 * 1024
    assert sum(len(result.text) for result in run.results) <= 256 * 1024
    assert values(sandbox, "", "2") == ["2"]


def test_files_are_limited(walled: Sandbox) -> None:
    limits = Limits(wall_s=3.0, file_mb=1)
    fill = """
def one():
    with open('/tmp/a', 'wb') as file:
        for _ in range(9): file.write(bytes(2**20))
def many():
    for i in range(9):
        with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(2**19))
def inodes():
    for i in range(9999): open(f'/tmp/i{i}', 'w').close()
"""
    for call in ("one()", "many()", "inodes()"):
        run = walled.run(fill, calls=[call], limits=limits)
        assert [r.error for r in run.results] in (["OSError"], ["PermissionError"])


# What lies outside


@pytest.mark.parametrize(
    "place", ["/tmp/../x", "/dev/shm/x", "/usr/lib/x", "/x", "/home/x", sys.base_prefix + "/lib/x"]
)
def test_nothing_outside_can_be_written(walled: Sandbox, place: str) -> None:
    found = attempt(walled, f"open({place!r}, 'w').write('x')")
    assert found in ("!PermissionError", "!OSError", "!FileNotFoundError")
    assert not Path(place).exists()


def test_a_file_outside_is_neither_read_nor_changed(walled: Sandbox, secret: Path) -> None:
    for deed in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w')",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, '/tmp/y')",
        f"import os; os.link({str(secret)!r}, '/tmp/y')",
        f"import os; os.symlink({str(secret)!r}, '/tmp/z'); open('/tmp/z').read()",
        f"import os; os.chmod({str(secret)!r}, 0)",
    ):
        assert attempt(walled, deed).startswith("!"), deed
    assert secret.read_text() == "the hidden tests"
    assert secret.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/environ",
        "/proc/1/environ",
        "/proc/1/mem",
        "/etc/passwd",
        "/sys/kernel",
        __file__,
        str(Path(__file__).resolve().parents[2] / "rewards" / "sandbox.py"),
    ],
)
def test_this_machines_files_are_out_of_sight(walled: Sandbox, path: str) -> None:
    deed = f"import os\n(os.listdir if os.path.isdir({path!r}) else open)({path!r})"
    assert attempt(walled, deed) in ("!FileNotFoundError", "!PermissionError")


def test_the_environment_is_empty(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    program = "import os, ctypes\nget = ctypes.CDLL(None).getenv\nget.restype = ctypes.c_char_p"
    assert values(sandbox, program, "dict(os.environ)", "get(b'TOKEN')") == ["{}", "None"]
    with Sandbox(lowest="limits", highest=sandbox.level) as fresh:
        assert values(fresh, program, "dict(os.environ)", "get(b'PATH')") == ["{}", "None"]


def test_only_its_own_four_descriptors_are_open(sandbox: Sandbox) -> None:
    program = """
import os
def is_open(n):
    try:
        os.fstat(n)
    except OSError:
        return False
    return True
"""
    assert values(sandbox, program, "[n for n in range(2_000) if is_open(n)]") == ["[0, 1, 2, 3]"]


def test_what_is_installed_cannot_be_imported(sandbox: Sandbox) -> None:
    for name in ("pytest", "rewards.grader", "posttrain"):
        assert attempt(sandbox, f"import {name}") in ("!ModuleNotFoundError", "!PermissionError")


def test_there_is_no_network(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=0.3)"
        assert attempt(sandbox, connect) in ("!PermissionError", "!OSError", "!ModuleNotFoundError")
    program = "import ctypes; socket = ctypes.CDLL(None).socket"
    inet, inet6, local, netlink, packet = 2, 10, 1, 16, 17
    calls = [f"socket({family}, 1, 0)" for family in (inet, inet6, local, netlink, packet)]
    assert values(sandbox, program, *calls) == ["-1"] * len(calls)


def test_no_process_can_be_seen_signalled_or_traced(sandbox: Sandbox) -> None:
    mine = os.getpid()
    for deed in (
        "import os; os.kill(0, 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.kill(1, 9)",
        "import os; os.kill(os.getppid(), 9)",
        f"import os; os.kill({mine}, 9)",
        f"import os; os.killpg({os.getpgrp()}, 9)",
        f"import os; os.pidfd_open({mine})",
        f"import resource; resource.prlimit({mine}, resource.RLIMIT_CPU, (0, 0))",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "import os; os.setuid(0)",
    ):
        assert attempt(sandbox, deed).startswith("!"), deed
    program = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall"
    column = MACHINES[platform.machine()][0]
    names = ("ptrace", "unshare", "mount", "setns", "io_uring_setup", "bpf", "keyctl", "kexec_load")
    numbers = [*(REFUSED[name][column] for name in names), CLONE3[column]]
    calls = [f"call({number}, {mine}, 0x10000000, 0, 0, 0)" for number in numbers]
    assert values(sandbox, program, *calls) == ["-1"] * len(calls)
    if platform.machine() == "x86_64":  # fork by its x32 number
        assert sandbox.run(program, calls=["call(0x40000000 | 57)"]).end == "died of SIGSYS"


def test_what_stays_behind_ends_with_its_run(sandbox: Sandbox) -> None:
    stay = """
import os, time
try:
    if os.fork(): os._exit(0)
    os.setsid()
    if os.fork(): os._exit(0)
except OSError:
    pass
time.sleep(997)
"""
    run = sandbox.run(stay, stdin="", limits=Limits(wall_s=0.3))
    assert run.end in ("timeout", "ended")
    assert values(sandbox, "", "1") == ["1"]
    listed = subprocess.run(["ps", "-eo", "uid,args"], capture_output=True, text=True, check=True)
    assert not [x for x in listed.stdout.splitlines() if x.split()[0] == "65534" and "server" in x]


def test_the_server_outlives_whatever_its_programs_do(sandbox: Sandbox) -> None:
    assert attempt(sandbox, "pass") == "done"
    assert sandbox.run("import ctypes; ctypes.string_at(0)").end == "died of SIGSEGV"
    assert sandbox.run("import os; os.abort()").end == "died of SIGABRT"
    assert attempt(sandbox, "pass") == "done"


# The sandbox as a thing


def test_a_level_below_the_one_asked_for_is_refused_with_its_name() -> None:
    with pytest.raises(SandboxError, match=r"'namespaces'.*'landlock' only.*sandbox: landlock"):
        Sandbox(highest="landlock").close()
    with pytest.raises(SandboxError, match="none of namespaces, landlock, limits"):
        Sandbox(lowest="none").close()  # pyright: ignore[reportArgumentType]


def test_threads_take_turns_and_get_their_own_answers(sandbox: Sandbox) -> None:
    found: dict[int, list[str]] = {}

    def ask(n: int) -> None:
        found[n] = list(itertools.chain(*(values(sandbox, f"x = {n}", "x") for _ in range(5))))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [str(n)] * 5 for n in range(4)}


def test_a_server_that_was_killed_is_replaced() -> None:
    with Sandbox(lowest="limits") as sandbox:
        sandbox._process.kill()
        sandbox._process.wait()
        assert sandbox.run("", calls=["1"]).results == [Result("1")]


def test_the_graders_limit_of_processor_time_for_an_item_is_not_the_servers() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (10_000, hard))
    try:
        with Sandbox(lowest="limits") as sandbox:
            limits = Path(f"/proc/{sandbox._process.pid}/limits").read_text()
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    line = next(line for line in limits.splitlines() if line.startswith("Max cpu time"))
    assert "10000" not in line


def test_one_process_shares_one_sandbox() -> None:
    assert shared("limits") is shared("limits")


def test_the_server_ends_with_its_owner() -> None:
    home = Path(__file__).resolve().parents[2]
    source = (
        "import os\nfrom rewards.sandbox import Sandbox\n"
        "sandbox = Sandbox(lowest='limits')\nprint(sandbox._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", source],
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    server = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10.0
    while server.exists() and ") Z " not in server.joinpath("stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
