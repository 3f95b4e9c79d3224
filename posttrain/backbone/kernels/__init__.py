"""Triton kernels, each file with its plain torch reference.

A file here imports triton; nothing else of the package does. So ask `use_kernels` first and import
the kernel after. So far every kernel ran under triton's interpreter on CPU alone (triton 3.6,
TRITON_INTERPRET=1, tests/backbone/kernels) and was compiled, not run, for sm_80 and
sm_90; `benchmarks/gpu_kernels.py` runs and times them on a GPU.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def use_kernels(x: Tensor) -> bool:
    """True if work on `x` is for these kernels: it lies on a GPU and triton is installed. Not in
    float64, since they sum in float32; not while a compiler traces, which fuses the torch path."""
    if torch.compiler.is_compiling():
        return False
    return x.is_cuda and x.dtype != torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
