"""One decode step on a CPU, and of a training step what goes token by token, in compiled loops:
what stands between two matrix products is one pass over each token's numbers, where torch has
dozens of calls that take longer than their sums.

numba compiles a loop when it is first called, for this machine, and keeps it on disk. Each file
says which torch function its loops are held against (tests/backbone/host). A token's numbers are
computed without a look at any other's, so its bits do not depend on the tokens beside it.

All is float32; connect.py and rows.py alone have gradients. Where `use_host_loops` says no, torch
does it, in decode.py and in who else asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

ROWS = 16
"""Tokens that a step has at least: a single one is sooner read from a long cache by torch."""

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""A sum of one token's numbers may go in vectors; NaN and infinities stay what they are."""


def use_host_loops(x: Tensor, num_tokens: int = ROWS) -> bool:
    """True if work on `x`, or a decode step over `num_tokens` whose weights are like it, is for
    these loops: float32 on a CPU, with numba installed, at least a block of tokens; not while a
    compiler traces, which fuses the torch path."""
    if num_tokens < ROWS or torch.compiler.is_compiling():
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return has_numba()


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def loop(function: F) -> F:
    """`function`, compiled at its first call; without numba as it is."""
    if not has_numba():
        return function
    numba: Any = import_module("numba")
    config, options = numba.config, {"nogil": True, "fastmath": REORDERED, "error_model": "numpy"}
    usual, config.CACHE_DIR = config.CACHE_DIR, kept_in()
    try:
        return numba.njit(cache=bool(config.CACHE_DIR), **options)(function)
    finally:
        config.CACHE_DIR = usual


def within(function: F) -> F:
    """`function`, to be put into the loops that call it, whose vectors it then goes in."""
    if not has_numba():
        return function
    numba: Any = import_module("numba")
    return numba.njit(inline="always")(function)


@cache
def kept_in() -> str:
    """The folder for what was compiled of these very files: numba looks whether the file of a
    function has changed, not those of the functions that it calls. "": there is none to write to,
    and each process compiles for itself."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
        folder = folder / "posttrain" / f"loops-{digest.hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""
