"""Teachers: any number of checkpoints behind one pool that holds a few of them at a time.

The pool answers with last hidden states, never logits: 32 times less at the size of DeepSeek-V4
Flash, and the learner rebuilds logits from the teacher's head, which it gets once. It is a plain
class; whether it lives in this process or another is the job's business.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from distill.batch import Example, ScoredExample, pad_right
from distill.causal_lm import head_weight, hidden_states
from posttrain.checkpoints import load_model
from posttrain.job import Future, RoleHandle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One row to read: `ScoreRequest(7, "specialist/code", input_ids=[5, 9, 4], positions=[1])`."""

    row: int
    """What the answer is filed under."""

    teacher: str
    input_ids: list[int]
    positions: list[int]
    """The positions whose hidden states are wanted."""


class Recent(Generic[T]):
    """Makes things by name and keeps the `capacity` used last."""

    def __init__(self, make: Callable[[str], T], *, capacity: int) -> None:
        self._make = make
        self._capacity = capacity
        self._kept: OrderedDict[str, T] = OrderedDict()

    def __call__(self, name: str) -> T:
        if name not in self._kept:
            while len(self._kept) >= self._capacity:  # room first: never capacity + 1 in memory
                self._kept.popitem(last=False)
            self._kept[name] = self._make(name)
        self._kept.move_to_end(name)
        return self._kept[name]


class TeacherPool:
    """Loads teachers on demand and reads rows with them."""

    def __init__(
        self,
        teachers: Mapping[str, str | Path],
        *,
        capacity: int = 8,
        rows_per_batch: int = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
    ) -> None:
        """`teachers` maps names to checkpoint folders. The device is a GPU where there is one."""
        self._folders = dict(teachers)
        self._rows_per_batch = rows_per_batch
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Recent[Any] = Recent(self._load, capacity=capacity)

    def score(self, requests: Sequence[ScoreRequest]) -> dict[int, np.ndarray]:
        """Last hidden states (len(positions), H) by row, in the teacher's dtype; bf16 as uint16.

        The rows of one teacher are read together, the shortest first.
        """
        order = sorted(requests, key=lambda r: (r.teacher, len(r.input_ids), r.row))
        found: dict[int, np.ndarray] = {}
        for batch in _batches(order, self._rows_per_batch):
            found.update(self._score(batch))
        return found

    def head(self, name: str) -> np.ndarray:
        """The teacher's head (V, H); bf16 as uint16."""
        return to_wire(head_weight(self._model(name), name=f"teacher {name!r}"))

    @torch.no_grad()
    def _score(self, batch: list[ScoreRequest]) -> dict[int, np.ndarray]:
        input_ids_BS, attention_mask_BS = pad_right([request.input_ids for request in batch])
        hidden_BSH = hidden_states(
            self._model(batch[0].teacher),
            input_ids_BS.to(self._device),
            attention_mask_BS.to(self._device),
        )
        return {
            request.row: to_wire(hidden_SH[request.positions])
            for request, hidden_SH in zip(batch, hidden_BSH, strict=True)
        }

    def _load(self, name: str) -> Any:
        model: Any = load_model(self._folders[name], dtype=self._dtype)
        return model.to(self._device)


def _batches(order: list[ScoreRequest], num_rows: int) -> Iterator[list[ScoreRequest]]:
    """Runs of at most `num_rows` requests to one teacher."""
    batch: list[ScoreRequest] = []
    for request in order:
        if batch and (request.teacher != batch[0].teacher or len(batch) == num_rows):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def to_wire(tensor: Tensor) -> np.ndarray:
    """A tensor as numpy: what travels between processes without being pickled."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_wire(array: np.ndarray) -> Tensor:
    """The tensor that `to_wire` was given."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


class Teachers:
    """The learner's side of the pool: asks it, waits for it, keeps the heads used last."""

    def __init__(self, pool: RoleHandle, *, num_heads: int, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self.head: Recent[Tensor] = Recent(self._fetch_head, capacity=num_heads)

    def ask(self, examples: Sequence[Example]) -> Callable[[], list[ScoredExample]]:
        """Send rows to all their teachers now; call the answer to wait for the hidden states."""
        pairs = [(e, name) for e in examples for name in e.teacher_names]
        future: Future = self._pool.call(
            "score",
            [
                ScoreRequest(row, teacher, example.input_ids, example.positions)
                for row, (example, teacher) in enumerate(pairs)
            ],
        )

        def answer() -> list[ScoredExample]:
            found: dict[int, np.ndarray] = future.result(self._timeout_s)
            rows = iter(range(len(pairs)))
            return [
                ScoredExample(e, {name: from_wire(found[next(rows)]) for name in e.teacher_names})
                for e in examples
            ]

        return answer

    def _fetch_head(self, name: str) -> Tensor:
        return from_wire(self._pool.call("head", name).result(self._timeout_s))
