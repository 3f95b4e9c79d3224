"""What each level stops and what it lets by: every attack at every level that this machine reaches,
and at limits where the machine has no filter of system calls. docs/rewards.md says the same."""

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from sandboxes import attempt, sandbox_of, values, without_filter

from posttrain.domains.public import humaneval, humaneval_at_limits
from posttrain.errors import DataError
from rewards.confinement import MACHINES, NOBODY
from rewards.programs import score
from rewards.sandbox import _SHARED, LEVELS, Limits, Sandbox

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
UNFILTERED = "limits, no filter"
COLUMNS = ("namespaces", "landlock", "limits", UNFILTERED)


@dataclass(frozen=True)
class Outside:
    """What there is to be had: a file that anyone may read and write, a server, a process."""

    secret: Path
    port: int
    victim: subprocess.Popen[bytes]


@pytest.fixture
def outside(secret: Path) -> Iterator[Outside]:
    user = NOBODY if os.geteuid() == 0 else None  # whom programs run as
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(
            ["/bin/sh", "-c", "echo; exec sleep 60"],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            env={"TOKEN": "secret"},
            stdout=subprocess.PIPE,
        ) as victim,
    ):
        assert victim.stdout is not None
        victim.stdout.readline()
        yield Outside(secret, server.getsockname()[1], victim)
        victim.kill()


@pytest.fixture(scope="module", params=COLUMNS)
def at(request: pytest.FixtureRequest) -> Iterator[tuple[str, Sandbox]]:
    """A column of the table, and a sandbox of it."""
    column: str = request.param
    if column in LEVELS:
        if column == "limits" and os.uname().machine not in MACHINES:
            column = UNFILTERED
        with sandbox_of(request.param) as sandbox:
            yield column, sandbox
        return
    with without_filter():
        sandbox = Sandbox(lowest="limits")
    with sandbox:
        yield column, sandbox


def done(sandbox: Sandbox, body: str) -> bool:
    return attempt(sandbox, body) == "done"


def leaves_a_file(sandbox: Sandbox, outside: Outside) -> bool:
    path = f"/tmp/posttrain-left-{outside.secret.name}"
    values(sandbox, f"open({path!r}, 'w').write('x')", "1")
    try:
        return done(sandbox, f"open({path!r})")
    finally:
        Path(path).unlink(missing_ok=True)


def fills_the_disk(sandbox: Sandbox, outside: Outside) -> bool:
    """Two files, each as large as all are allowed to be."""
    paths = [f"/tmp/posttrain-{place}-{outside.secret.name}" for place in "ab"]
    fill = f"for path in {paths}:\n  open(path, 'wb').write(bytes(2**20))"
    run = sandbox.run(fill, calls=["'done'"], limits=Limits(file_mb=1))
    for path in paths:
        Path(path).unlink(missing_ok=True)
    return [result.text for result in run.results] == ["'done'"]


def stays_behind(sandbox: Sandbox, outside: Outside) -> bool:
    body = """
import os, time
def stay():
    child = os.fork()
    if child == 0:
        os.setsid()
        for n in range(9): os.close(n) if n < 4 else None
        time.sleep(60)
    return child
"""
    (found,) = values(sandbox, body, "stay()")
    if not found.isdigit():
        return False
    with suppress(ProcessLookupError):
        os.kill(int(found), signal.SIGKILL)
        return True
    return False


def signals(sandbox: Sandbox, outside: Outside) -> bool:
    return done(sandbox, f"import os; os.kill({outside.victim.pid}, 0)")


def connects(sandbox: Sandbox, outside: Outside) -> bool:
    """By libc: Python's own module may lie out of the user nobody's sight."""
    address = struct.pack("=H", socket.AF_INET) + struct.pack(">HI8x", outside.port, 0x7F000001)
    return done(
        sandbox,
        f"import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.connect("
        f"libc.socket({int(socket.AF_INET)}, {int(socket.SOCK_STREAM)}, 0), {address!r}, 16) == 0",
    )


def forges(sandbox: Sandbox, outside: Outside) -> bool:
    """Writes results where its calls' are written, and ends before they are made."""
    tests = [{"call": f"f({x})", "expect": str(x * x)} for x in (2, 3, 5)]
    program = "import os\nos.write(3, b'=\"4\"\\n' * 3)\nos._exit(0)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_SHARED, (os.getpid(), "limits"), sandbox)
        return score(program, tests=tests, sandbox="limits").reward > 0


ATTACKS: dict[str, Callable[[Sandbox, Outside], bool]] = {
    "run for ever": lambda sandbox, _: (
        sandbox.run("while True: pass", limits=Limits(wall_s=0.3)).end != "timeout"
    ),
    "take more memory than allowed": lambda sandbox, _: done(sandbox, "bytearray(2**31)"),
    "print 200 MB": lambda sandbox, _: (
        len(sandbox.run("print('x' * 200_000_000)").stdout) > 256 * 1024
    ),
    "forge results, end early": forges,
    "read its own environment": lambda sandbox, _: done(sandbox, "import os; assert os.environ"),
    "start another process": lambda sandbox, _: done(
        sandbox, "import os\nif os.fork() == 0: os._exit(0)"
    ),
    "stay behind after its end": stays_behind,
    "signal a process of its user": signals,
    "connect to a server": connects,
    "see other processes": lambda sandbox, outside: done(
        sandbox, f"import os; assert '{outside.victim.pid}' in os.listdir('/proc')"
    ),
    "read the environment of a process of its user": lambda sandbox, outside: done(
        sandbox, f"assert 'TOKEN' in open('/proc/{outside.victim.pid}/environ').read()"
    ),
    "read a file that anyone may read": lambda sandbox, outside: done(
        sandbox, f"assert open({str(outside.secret)!r}).read()"
    ),
    "change a file that anyone may write": lambda sandbox, outside: done(
        sandbox, f"open({str(outside.secret)!r}, 'w').write('x')"
    ),
    "leave a file for the next program": leaves_a_file,
    "fill the disk with many files": fills_the_disk,
}

NEEDS_WALLS = (
    "see other processes", "read the environment of a process of its user",
    "read a file that anyone may read", "change a file that anyone may write",
    "leave a file for the next program", "fill the disk with many files",
)  # fmt: skip
"""What works at limits."""
NEEDS_FILTER = (
    "start another process", "stay behind after its end", "signal a process of its user",
    "connect to a server",
)  # fmt: skip
"""What works there too where the machine has no filter of system calls."""


def works(attack: str, column: str) -> bool:
    return (attack in NEEDS_WALLS and column.startswith("limits")) or (
        attack in NEEDS_FILTER and column == UNFILTERED
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_stopped_at_the_levels_that_are_said_to_stop_it_and_at_no_other(
    at: tuple[str, Sandbox], outside: Outside, attack: str
) -> None:
    column, sandbox = at
    assert ATTACKS[attack](sandbox, outside) == works(attack, column)
    assert values(sandbox, "", "2") == ["2"]


def test_the_page_says_of_every_attack_what_was_found() -> None:
    lines = [f"| a program can | {' | '.join(f'`{c}`' for c in COLUMNS[:3])} | {UNFILTERED} |"]
    lines += ["|---|---|---|---|---|"]
    for attack in ATTACKS:
        cells = ["**yes**" if works(attack, column) else "no" for column in COLUMNS]
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    assert "\n".join(lines) in PAGE.read_text("utf-8"), "\n".join(lines)


def test_what_may_not_be_lower_is_refused_where_there_is_no_filter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = "def f(x):\n"
    raw = {
        "entry_point": "f", "prompt": head, "base_input": [[1], [2]], "plus_input": [],
        "canonical_solution": "    return x\n",
    }  # fmt: skip
    monkeypatch.delitem(_SHARED, (os.getpid(), "namespaces"), raising=False)
    with without_filter(), pytest.raises(DataError, match=r"'limits' only.*humaneval_at_landlock"):
        humaneval(raw)
    made = humaneval_at_limits(raw)
    assert made is not None
    assert [test["expect"] for test in made["tests"]] == ["1", "2"]
