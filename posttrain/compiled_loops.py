"""Whether the loops of posttrain/backbone/host are compiled for this machine: once, in processes of
their own, and all others read what these have kept. Asking imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

log = logging.getLogger(__name__)

LOOPS = Path(__file__).parent / "backbone" / "host"

BUILDING = "POSTTRAIN_BUILDS_LOOPS"
"""Set in the process that compiles."""

UNUSED_DAYS = 30
"""What no process has asked for in so many days goes when others are compiled."""


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


@cache
def is_built() -> bool:
    """Whether the loops can be read from disk, once one process has compiled them for all. True
    too where nothing can be kept: then each process compiles those that it calls."""
    folder = kept_in()
    if not folder or os.environ.get(BUILDING):
        return True
    done = Path(folder) / "done"
    with (Path(folder) / "lock").open("w") as lock:
        os.utime(lock.name)  # in use
        if not done.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            log.warning("compiling the backbone's loops for this machine: half a minute, once")
            if error := _build():
                log.warning("torch stands in for them, for that failed: %s", error[-2000:])
                return False
            done.touch()
            remove_unused(Path(folder))
    return True


def _build() -> str:
    """What went wrong, if anything."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    built = subprocess.run(
        [sys.executable, "-m", "posttrain.backbone.host.build"],
        env={**os.environ, BUILDING: "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    return built.stderr or "no reason given" if built.returncode else ""


def remove_unused(folder: Path) -> None:
    """Of what was kept beside `folder` that which nobody has asked for in `UNUSED_DAYS`, nor is
    compiling. A process that still has it is not harmed: it compiles the rest for itself, to the
    same bits."""
    for other in folder.parent.glob("loops-*"):
        try:
            with (other / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                age_s = time.time() - os.fstat(lock.fileno()).st_mtime
                if other != folder and age_s > UNUSED_DAYS * 86400:
                    shutil.rmtree(other)
        except OSError:  # there is no lock, another process holds it, or the files are not ours
            continue


@cache
def kept_in() -> str:
    """The folder for what was compiled of these very files, by this numba, for this processor:
    numba looks whether the file of a function has changed, not those of the functions that it
    calls. "": there is none to write to."""
    processor = import_module("llvmlite.binding").get_host_cpu_name()
    versions = sys.version, processor, version("numba"), version("llvmlite")
    digest = hashlib.blake2b(" ".join(versions).encode(), digest_size=8)
    for path in sorted(LOOPS.glob("*.py")):
        digest.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
        folder = folder / "posttrain" / f"loops-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""
