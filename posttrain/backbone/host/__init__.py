"""One decode step on a CPU, and of a training step what goes token by token, in compiled loops:
what stands between two matrix products is one pass over each token's numbers, where torch has
dozens of calls that take longer than their sums.

numba compiles them for this machine, in a process of their own before the first is used (build.py),
and all processes read what it has kept. Each file says which torch function its loops are held
against (tests/backbone/host). A token's numbers are computed without a look at any other's, so its
bits do not depend on the tokens beside it.

All is float32; connect.py and rows.py alone have gradients. Where `use_host_loops` says no, torch
does it, in decode.py and in who else asks.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BUILDING = "POSTTRAIN_BUILDS_LOOPS"
"""Set in the process that compiles."""

ROWS = 16
"""Tokens that a decode step has at least, a sampler's block; fewer go by torch."""


def use_host_loops(x: Tensor, num_tokens: int = ROWS) -> bool:
    """True if work on `x`, or a decode step over `num_tokens` whose weights are like it, is for
    these loops: float32 on a CPU, with numba installed, at least a block of tokens; not while a
    compiler traces, which fuses the torch path."""
    if num_tokens < ROWS or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return has_numba() and is_built()


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


@cache
def is_built() -> bool:
    """Whether the loops can be read from disk, once one process has compiled them for all. True
    too where nothing can be kept: then each process compiles all of them for itself."""
    folder = kept_in()
    if not folder or os.environ.get(BUILDING):
        return True
    done = Path(folder) / "done"
    with (Path(folder) / "lock").open("w") as lock:
        if not done.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            log.warning("compiling the backbone's loops for this machine: half a minute, once")
            root = str(Path(__file__).parents[3])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            built = subprocess.run(
                [sys.executable, "-m", "posttrain.backbone.host.build"],
                env={**os.environ, BUILDING: "1", "PYTHONPATH": os.pathsep.join(paths)},
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                log.warning("torch stands in for them, for that failed: %s", built.stderr[-2000:])
                return False
            done.touch()
    return True


@cache
def kept_in() -> str:
    """The folder for what was compiled of these very files, by this numba, for this processor:
    numba looks whether the file of a function has changed, not those of the functions that it
    calls. "": there is none to write to."""
    versions = (import_module(name).__version__ for name in ("numba", "llvmlite"))
    processor = import_module("llvmlite.binding").get_host_cpu_name()
    digest = hashlib.blake2b(" ".join([sys.version, processor, *versions]).encode(), digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
        folder = folder / "posttrain" / f"loops-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""
