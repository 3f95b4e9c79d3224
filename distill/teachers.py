"""Teachers: any number of checkpoints behind one pool of workers that holds a few at a time.

The pool answers with last hidden states, never logits: 32 times less at the size of DeepSeek-V4
Flash. The learner rebuilds logits from the teacher's head, which it reads from disk itself. A
worker is a plain class; whether it lives in this process or another is the job's business.
"""

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import torch

from distill.batch import Example, ScoredExample, pad_right
from distill.causal_lm import hidden_states
from distill.hidden_store import HiddenRow, HiddenStore, row_key, write_row
from distill.mesh import own_device
from distill.reverse_kl import Head
from distill.teacher_files import find_teacher
from distill.teacher_memory import Residents
from distill.teacher_models import Loader
from distill.teacher_rows import Reading, Row, cut, deal, from_wire, to_wire
from distill.teacher_shards import meet
from posttrain.job import Future, RoleHandle

NO_ROW = Row([0], [0], "")
"""What a worker reads while others have a batch more."""

TOKENS_PER_BATCH = 1 << 16
"""Tokens that a worker reads at once, padding included, whatever the number of rows."""


class TeacherPool:
    """One worker of a pool: loads teachers on demand and reads rows with them."""

    def __init__(
        self,
        *,
        capacity: int = 8,
        max_gb: float = float("inf"),
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
        rank: int = 0,
        num_workers: int = 1,
        meeting: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """At most `capacity` teachers, of `max_gb` in this worker, stay in memory. The device is a
        GPU where there is one. Workers of a pool of several meet at the file `meeting`."""
        device = device or own_device().type
        self._loader = Loader(dtype=getattr(torch, dtype), device=device)
        self._model = Residents(self._loader, capacity=capacity, max_bytes=max_gb * 1e9)
        self._meet = None
        if num_workers > 1:
            assert meeting is not None
            self._meet = lambda: meet(
                meeting, rank=rank, num_ranks=num_workers, device=device, timeout_s=timeout_s
            )

    def score(
        self, readings: Sequence[Reading], then: str | None = None
    ) -> list[list[np.ndarray | None]]:
        """For each reading last hidden states (len(positions), H) row after row: None where they
        were written to the row's path, else in the teacher's dtype, bf16 as uint16.

        `then` is the folder of the teacher that will be asked next, if that is known.
        """
        if self._meet:  # here and not when it was made: the workers are made one after another
            self._loader.mesh, self._meet = self._meet(), None
        order = [reading.folder for reading in readings] + ([then] if then else [])
        return [
            self._read(reading, order[i + 1] if i + 1 < len(order) else None)
            for i, reading in enumerate(readings)
        ]

    @torch.no_grad()
    def _read(self, reading: Reading, then: str | None) -> list[np.ndarray | None]:
        model = self._model(find_teacher(Path(reading.folder)))
        if then:
            self._model.expect(find_teacher(Path(then)))
        found: list[np.ndarray | None] = []
        for number in range(reading.num_rounds):
            is_extra = number >= len(reading.batches)
            batch = [NO_ROW] if is_extra else reading.batches[number]
            input_ids_BS, attention_mask_BS = pad_right([row.input_ids for row in batch])
            device = self._loader.device
            hidden_BSH = hidden_states(model, input_ids_BS.to(device), attention_mask_BS.to(device))
            if not is_extra:
                wanted = zip(batch, hidden_BSH, strict=True)
                found += [deliver(row, hidden_SH[row.positions]) for row, hidden_SH in wanted]
        return found


def deliver(row: Row, hidden_NH: torch.Tensor) -> np.ndarray | None:
    """Write hidden states where the row says; give them back where that cannot be."""
    path = Path(row.path)
    if row.path and path.parent.is_dir():
        try:
            write_row(path, hidden_NH)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        else:
            return None
    return to_wire(hidden_NH)


@dataclass(frozen=True, slots=True)
class Teacher:
    """`Teacher("specialist/code", Path("runs/a/stages/grpo.code-1a/checkpoint"), "9f2c", 4096)`."""

    name: str
    folder: Path
    identity: str
    """Hash of weights, tokenizer and head, and the dtype it computes in."""

    hidden_size: int
    itemsize: int = 4
    """Bytes of a number of its hidden states."""


class Teachers:
    """The learner's side of the pool: asks it, waits for it, reads heads.

    All questions come from one process: workers of a pool gather layers together, so that all of
    them must be asked the same in the same order.
    """

    def __init__(
        self,
        pool: Sequence[RoleHandle],
        examine: Callable[[str], Teacher],
        *,
        store: HiddenStore,
        rows_per_batch: int,
        timeout_s: float,
    ) -> None:
        """`examine` gives the teacher of a name, checked."""
        self._pool = list(pool)
        self._examine = examine
        self._teachers: dict[str, Teacher] = {}
        self._store = store
        self._rows_per_batch = rows_per_batch
        self._timeout_s = timeout_s
        self._loader = Loader(dtype=torch.float32, device="cpu")
        self._lock = Lock()
        """Over the store: rows are asked for on one thread while others are freed on another."""

    def hire(self, names: Iterable[str]) -> None:
        """Examine those that are new. Raises what the examination does."""
        for name in names:
            if name not in self._teachers:
                self._teachers[name] = self._examine(name)

    @property
    def folders(self) -> dict[str, Path]:
        """Where each lies, by name."""
        return {name: teacher.folder for name, teacher in self._teachers.items()}

    def ask(
        self, examples: Sequence[Example], *, step: int = 0, then: str | None = None
    ) -> Callable[[], list[ScoredExample]]:
        """Send a step's rows to their teachers now, but for those that were scored before; call the
        answer to wait. Another step's rows are others, equal or not: their bits depend on the rows
        beside them. `then` names the teacher that will be asked next, so that it is read meanwhile.
        """
        rows: dict[str, dict[str, Row]] = defaultdict(dict)
        for example in examples:
            for name in example.teacher_names:
                row = self._row(name, example, step)
                rows[name][row.path] = row
        batches = {name: self._missing(rows[name].values()) for name in sorted(rows)}
        dealt = [
            deal(str(self._teachers[name].folder), found, len(self._pool))
            for name, found in batches.items()
            if found
        ]
        readings = [list(of_worker) for of_worker in zip(*dealt, strict=True)]
        next_folder = str(self._teachers[then].folder) if then else None
        futures: list[Future] = [
            worker.call("score", reading, next_folder)
            for worker, reading in zip(self._pool, readings, strict=bool(readings))
        ]

        def answer() -> list[ScoredExample]:
            for reading, future in zip(readings, futures, strict=True):
                self._file(reading, future.result(self._timeout_s))
            return [
                ScoredExample(e, {name: self._found(name, e, step) for name in e.teacher_names})
                for e in examples
            ]

        return answer

    def free(self, rows: Iterable[ScoredExample]) -> None:
        """The learner is done with these: their hidden states are deleted."""
        found = [hidden for row in rows for hidden in row.teacher_hidden.values()]
        keys = {Path(hidden.path).name for hidden in found if isinstance(hidden, HiddenRow)}
        with self._lock:
            self._store.free(keys)

    def close(self) -> None:
        """The run is over: nothing of it is left in memory or on disk."""
        self._store.close()

    def _key(self, name: str, example: Example, step: int) -> str:
        maker = f"{self._teachers[name].identity} {step}"
        return row_key(maker, example.input_ids, example.positions)

    def _row(self, name: str, example: Example, step: int) -> Row:
        teacher = self._teachers[name]
        num_bytes = len(example.positions) * teacher.hidden_size * teacher.itemsize
        with self._lock:
            path = self._store.place(self._key(name, example, step), num_bytes)
        return Row(example.input_ids, example.positions, str(path))

    def _missing(self, rows: Iterable[Row]) -> list[list[Row]]:
        """The batches with a row that is not there yet, whole: so its bits are those of a run that
        was never killed."""
        batches = cut(rows, num_rows=self._rows_per_batch, num_tokens=TOKENS_PER_BATCH)
        return [b for b in batches if not all(Path(row.path).exists() for row in b)]

    def _file(
        self, readings: Sequence[Reading], found: Sequence[Sequence[np.ndarray | None]]
    ) -> None:
        """Put into the store what its teacher could not put there itself."""
        for reading, arrays in zip(readings, found, strict=True):
            rows = [row for batch in reading.batches for row in batch]
            for row, array in zip(rows, arrays, strict=True):
                if array is not None:
                    with self._lock:
                        self._store.put(Path(row.path).name, from_wire(array))

    def _found(self, name: str, example: Example, step: int) -> HiddenRow:
        found = self._store.find(self._key(name, example, step))
        assert found is not None, f"{name} answered without a row"
        return found

    def head(self, name: str) -> Head:
        """A teacher's head, read anew."""
        return read_head(self._loader, self._teachers[name].folder)


def read_head(loader: Loader, folder: Path) -> Head:
    """A teacher's head, mapped from its file: an adapter's is its base's."""
    return loader.head(find_teacher(folder).base)
