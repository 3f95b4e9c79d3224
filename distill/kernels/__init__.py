"""Triton kernels of the loss. Importing this package imports no triton: ask `use_kernels` first and
import the kernel after. Run so far under triton's interpreter on CPU alone (triton 3.6)."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def use_kernels(x: Tensor) -> bool:
    """True if work on `x` is for these kernels: it lies on a GPU and triton is installed. Not in
    float64, since they sum in float32."""
    return x.is_cuda and x.dtype == torch.float32 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
