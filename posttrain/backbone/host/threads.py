"""Rows in several threads: loops hold no lock, and a row's result is its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import torch

WORTH = 1 << 27
"""Multiplications that are worth a thread: it may begin a millisecond late."""


def spread(work: Callable[[int, int], object], ends: Sequence[int]) -> None:
    """work(first, end) of the rows up to each of `ends`, all at once. Raises what a part raised."""
    first, *others = pairwise([0, *ends])
    futures = [_pool(len(others)).submit(work, *part) for part in others]
    work(*first)
    for future in futures:
        future.result()


def even(num_rows: int, row_size: int) -> list[int]:
    """Where the parts of so many rows end, of `row_size` multiplications each: one for each of
    torch's threads that is worth it."""
    num = max(min(torch.get_num_threads(), num_rows, num_rows * row_size // WORTH), 1)
    return [num_rows * (part + 1) // num for part in range(num)]


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, "loops")


os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are the parent's
