"""Triton kernels, each file with its plain torch reference.

A file here imports triton; nothing else of the package does. So ask `use_kernels` first and import
the kernel after. So far every kernel ran under triton's interpreter on CPU alone (triton 3.6,
TRITON_INTERPRET=1, tests/posttrain/backbone/kernels) and was compiled, not run, for sm_80 and
sm_90; `benchmarks/gpu_kernels.py` runs and times them on a GPU.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def use_kernels(x: Tensor) -> bool:
    """True if work on `x` can run in these kernels: it lies on a GPU and triton is installed."""
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
