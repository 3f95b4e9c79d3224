"""What a sandbox's server does itself: it ends a flood at once, and has no group to give away."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.sandbox import LEVELS, Limits, Sandbox
from rewards.sandbox_server import _collect

HOME = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("written", [6, 5000])
def test_what_is_too_much_ends_the_reading_while_the_writer_lives(written: int) -> None:
    quiet, loud = os.pipe(), os.pipe()
    found = {quiet[0]: bytearray(), loud[0]: bytearray()}
    os.write(loud[1], b"x" * written)
    try:
        end = _collect(found, time.monotonic() + 5.0, max_bytes=5)
    finally:
        for descriptor in (*quiet, *loud):
            os.close(descriptor)
    assert end == "output"
    assert found == {quiet[0]: b"", loud[0]: b"xxxxx"}


def test_as_much_as_is_allowed_does_not_end_it() -> None:
    read, write = os.pipe()
    found = {read: bytearray()}
    os.write(write, b"xxxxx")
    os.close(write)
    assert _collect(found, time.monotonic() + 5.0, max_bytes=5) == "ended"
    os.close(read)


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        ("import time\nprint('x' * 10**6, flush=True)\ntime.sleep(60)", []),
        ("import time\nx = 'a' * 90_000", ["x", "x", "x", "x", "time.sleep(60)"]),
    ],
    ids=["stdout", "results"],
)
def test_a_program_that_says_too_much_is_not_waited_for(program: str, calls: list[str]) -> None:
    with Sandbox(lowest="limits") as sandbox:
        run = sandbox.run(program, calls=calls, limits=Limits(wall_s=20.0))
    assert run.end == "output"  # and no timeout: it was ended before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has groups to lose")
@pytest.mark.parametrize("level", LEVELS)
def test_roots_groups_are_not_the_programs(level: str) -> None:
    source = (
        "import os\nfrom rewards.sandbox import Sandbox\n"
        f"with Sandbox(lowest='limits', highest={level!r}) as sandbox:\n"
        "    run = sandbox.run('import os', calls=['os.getgroups()', 'os.getresgid()'])\n"
        "    print(sandbox.level, *(result.text for result in run.results), sep='|')\n"
        "print(os.getgroups())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", source],
        env={**os.environ, "PYTHONPATH": str(HOME)},
        extra_groups=[4, 27],
        capture_output=True,
        text=True,
        check=True,
    )
    told, own = done.stdout.splitlines()
    assert own == "[4, 27]"
    assert told.split("|")[1:] == ["[]", "(65534, 65534, 65534)"]
