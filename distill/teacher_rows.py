"""What travels to a pool of teachers and back, and how rows are dealt out to its workers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One row to read: `Row([5, 9, 4], positions=[1], path="/dev/shm/posttrain-hidden-1a/9f")`."""

    input_ids: list[int]
    positions: list[int]
    """The positions whose hidden states are wanted."""

    path: str
    """Where they are to be written, if that folder can be seen; else they are the answer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What one worker reads with one teacher: `Reading("/checkpoints/code", [[row, row]], 2)`.

    All workers gather the teacher's layers together, so each makes `num_rounds` forwards, with a
    token that nobody asked for where it has fewer batches.
    """

    folder: str
    batches: list[list[Row]]
    num_rounds: int


def cut(rows: Iterable[Row], *, num_rows: int, num_tokens: int) -> list[list[Row]]:
    """Batches of similar lengths, each of at most `num_rows` rows and, padding included, about
    `num_tokens` tokens. They depend on which rows there are, not on their order: a row's last bits
    depend on the rows that are read beside it."""
    order = sorted(rows, key=lambda row: (len(row.input_ids), row.input_ids, row.positions))
    batches: list[list[Row]] = []
    for row in order:
        last = batches[-1] if batches else []
        is_full = len(last) == num_rows or (len(last) + 1) * len(row.input_ids) > num_tokens
        if is_full or not last:
            batches.append([row])
        else:
            last.append(row)
    return batches


def deal(folder: str, batches: Sequence[list[Row]], num_workers: int) -> list[Reading]:
    """Each worker's part: batches of similar lengths at the same time."""
    num_rounds = -(-len(batches) // num_workers)
    return [
        Reading(folder, list(batches[worker::num_workers]), num_rounds)
        for worker in range(num_workers)
    ]


def to_wire(tensor: Tensor) -> np.ndarray:
    """A tensor as numpy: what travels between processes without being pickled."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The tensor that `to_wire` was given."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
