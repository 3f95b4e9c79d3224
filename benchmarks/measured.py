"""What every benchmark says of where it was measured, and how it writes its page."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def machine(*packages: str) -> Json:
    """What the numbers depend on: day, processor, cores, load and versions."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text("utf-8").splitlines() if x.startswith("model name")]
        cpu = lines[0].partition(":")[2].strip() if lines else cpu
    wanted = packages or ("torch", "transformers")
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()} | {x: version(x) for x in wanted},
    }


def place(data: Json, *, threads: str = "one thread") -> str:
    """`machine` in words: "2026-11-23, a processor, one thread of 2, python 3.11, torch 2.13"."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return f"{data['date']}, {data['cpu']}, {threads} of {data['cores']}, {versions}"


def write(path: Path, data: Json, page: Callable[[Json], str]) -> None:
    """The page, and the numbers it is made of as JSON beside it."""
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    path.write_text(page(data), encoding="utf-8")


def apart(*arguments: str) -> Json:
    """What this very command says with `arguments` behind it, in a process of its own with one
    thread: the last line of its output."""
    done = subprocess.run(
        [sys.executable, *sys.argv, *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"},
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def memory_mib(field: str) -> float:
    """A line of Linux's /proc/self/status: "VmRSS" is now, "VmHWM" the peak."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def forget_peak() -> None:
    """The next "VmHWM" is the peak since this call."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
