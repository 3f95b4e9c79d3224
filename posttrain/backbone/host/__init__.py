"""One decode step on a CPU, and of a training step what goes token by token, in compiled loops:
what stands between two matrix products is one pass over each token's numbers, where torch has
dozens of calls that take longer than their sums.

numba compiles them for this machine, before the first is used (posttrain/compiled_loops.py). Each
file says which torch function its loops are held against (tests/backbone/host). A token's numbers
are computed without a look at any other's, so its bits do not depend on the tokens beside it.

All is float32; connect.py and rows.py alone have gradients. Where `use_host_loops` says no, torch
does it, in decode.py and in who else asks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compiled_loops import has_numba, is_built

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
