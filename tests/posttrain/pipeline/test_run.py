"""Runs of fake stages on a real Ray, each in a process of its own, seen from outside."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_driver import make_work

from posttrain import compiled_loops
from posttrain.errors import StageError
from posttrain.pipeline.run import run_work

pytestmark = pytest.mark.ray

DRIVER = Path(__file__).with_name("fake_driver.py")
MARK = "POSTTRAIN_TEST_MARK"
LISTENING = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


class Run:
    """A driver process and everything it started, known by a mark in their environment."""

    def __init__(self, scenario: str, directory: Path, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), scenario, str(directory)],
            # fake stages call no loops: none are compiled in the time that a test has
            env={**os.environ, **environment, MARK: self.mark, "NUMBA_DISABLE_JIT": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        """The exit code and what was said."""
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said

    def processes(self) -> dict[int, str]:
        """Living processes of this run, Ray's included, with their command lines."""
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode().strip()
            except OSError:  # ended meanwhile, or another user's
                continue
        return {pid: command for pid, command in found.items() if command}  # zombies have none

    def file(self, pattern: str) -> Path | None:
        """The one file in the run directory that fits."""
        return next(self.directory.glob(pattern), None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs in tmp_path/run, and kills what is left of them."""
    runs: list[Run] = []

    def start_run(scenario: str, **environment: str) -> Run:
        runs.append(Run(scenario, tmp_path / "run", **environment))
        return runs[-1]

    yield start_run
    for run in runs:
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
        if run.process.stderr:
            run.process.stderr.close()


def wait_for(condition: Callable[[], object], timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses, in hexadecimal, on which these processes listen."""
    inodes: set[str] = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = str(link.readlink())
            except OSError:
                continue
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    addresses: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


def test_independent_stages_run_side_by_side_on_loopback_and_nothing_is_left(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("tree")
    wait_for(lambda: run.file("stages/sft.*.partial/steps.txt"))
    addresses = listening_addresses(set(run.processes()))
    code, said = run.end()
    assert code == 0, said
    assert said.count("programs of domain code run in the sandbox at the level landlock") == 1
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["sandboxes"] == {"code": "landlock"}
    assert addresses
    assert addresses <= set(LOOPBACK)
    assert run.processes() == {}
    assert (tmp_path / "calls.txt").read_text().splitlines()[0] == "base"

    steps = [
        [line.split() for line in path.read_text().splitlines()]
        for path in sorted(run.directory.glob("stages/sft.*/steps.txt"))
    ]
    times = [[float(when) for when, _ in stage] for stage in steps]
    assert max(first[0] for first in times) < min(last[-1] for last in times)
    assert len({pid for stage in steps for _, pid in stage}) == 2

    opd = run.file("stages/opd-*/result.txt")
    role = run.file("stages/opd-*/role.txt")
    assert opd
    assert role
    assert opd.read_text() == "13 the role found a wrong rowd"
    assert len(set(role.read_text().split())) == 2  # the role's process and the stage's
    log = run.file("stages/base-*/log.txt")
    assert log
    assert log.read_text() == "the log hears this\n"

    again = start("tree")
    began = time.monotonic()
    code, said = again.end()
    assert code == 0
    assert "nothing to do" in said
    assert time.monotonic() - began < 5


def test_a_killed_run_goes_on_and_computes_nothing_twice(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    calls, stages = tmp_path / "calls.txt", tmp_path / "run" / "stages"

    interrupted = start("long")
    wait_for(lambda: interrupted.file("stages/sft.a-*.partial/steps.txt"))
    interrupted.process.send_signal(signal.SIGINT)
    code, _ = interrupted.end(timeout_s=15)
    assert code != 0
    assert interrupted.processes() == {}
    assert len(list(stages.glob("base-*/done.json"))) == 1

    killed = start("long")
    partial = next(stages.glob("sft.a-*.partial"))
    before = len((partial / "steps.txt").read_text().splitlines())
    wait_for(lambda: len((partial / "steps.txt").read_text().splitlines()) > before)
    os.killpg(killed.process.pid, signal.SIGKILL)
    wait_for(lambda: not [c for c in killed.processes().values() if "ray::Worker" in c], 20)

    code, said = start("long").end()
    assert code == 0, said
    done = next(stages.glob("sft.a-*/"))
    assert not list(stages.glob("*.partial"))
    assert calls.read_text().split() == ["base", "sft/a", "sft/a", "sft/a", "sft/b"]
    assert len((done / "steps.txt").read_text().splitlines()) == 30
    assert (done / "result.txt").read_text() == "e" + "a" * 30
    assert "goes on  sft/a" in said


def test_a_dead_worker_is_replaced_and_a_wrong_row_ends_the_run(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("die once")
    code, said = run.end()
    assert code == 2
    assert said.splitlines()[-1] == "DataError: rows.jsonl, line 3: no prompt; add one"
    assert "again    base  in a new process" in said
    assert (tmp_path / "calls.txt").read_text().splitlines().count("base") == 2
    base = run.file("stages/base-*/steps.txt")
    assert base
    assert len(base.read_text().splitlines()) == 2
    assert run.processes() == {}


def test_a_stage_that_dies_twice_names_its_log(start: Callable[..., Run]) -> None:
    run = start("die")
    code, said = run.end()
    assert code == 2
    log = run.file("stages/base-*.partial/log.txt")
    assert str(log) in said
    assert "StageError: the process of stage base died 2 times" in said
    assert run.processes() == {}


def test_loops_are_compiled_before_the_cluster_starts_and_the_driver_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_loops.sys, "executable", "false")  # nothing is compiled here

    def start(*_: object) -> None:
        assert "compiling the backbone's loops" in caplog.text
        raise StageError("far enough")

    monkeypatch.setattr("posttrain.pipeline.run.Cluster", start)
    caches = compiled_loops.kept_in, compiled_loops.is_built
    for cache in caches:
        cache.cache_clear()
    try:
        with pytest.raises(StageError, match="far enough"):
            run_work(make_work("crash", tmp_path / "run"))
    finally:
        for cache in caches:
            cache.cache_clear()
