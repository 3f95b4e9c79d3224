"""Loops over tensors' rows, whole blocks of them to a thread."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from posttrain.backbone.host.arrays import array
from posttrain.backbone.host.sinkhorn import BLOCK
from posttrain.backbone.host.threads import even, spread


def in_parts(loops: Any, num_rows: int, row_size: int, *inputs: Any) -> None:
    """loops(first, end, *inputs) of all rows, of `row_size` multiplications each. Tensors are
    contiguous: loops read them by rows' addresses."""
    assert all(x.is_contiguous() for x in inputs if isinstance(x, Tensor))
    args = [array(x) if isinstance(x, Tensor) else x for x in inputs]
    blocks = even(num_blocks(num_rows), BLOCK * row_size)
    spread(lambda first, end: loops(first, end, *args), [min(b * BLOCK, num_rows) for b in blocks])


def num_blocks(num_rows: int) -> int:
    return -(-num_rows // BLOCK)
