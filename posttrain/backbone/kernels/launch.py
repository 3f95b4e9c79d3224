"""What every kernel's launch shares: a typed `jit`, powers of two, the type of dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
import triton.language as tl  # pyright: ignore[reportMissingImports]  # the same
from torch import Tensor

DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, whose own type is unknown where triton is not installed."""
    return triton.jit(function)


def power_of_two(n: int, *, least: int = 1, most: int | None = None) -> int:
    """The smallest power of two that is at least n, kept within [least, most]."""
    found = max(least, 1 << max(n - 1, 0).bit_length())
    return found if most is None else min(found, most)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def dot_type(x: Tensor) -> Any:
    """The type whose products x's dots are made of; sums are float32 always. Tensors on CPU are
    the interpreter's, whose dot multiplies the bit patterns of bfloat16."""
    return DOT_TYPES[x.dtype] if x.is_cuda else tl.float32
