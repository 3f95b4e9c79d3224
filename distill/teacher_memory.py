"""The teachers in memory: those used last, and the next one, which a thread reads meanwhile."""

import ctypes
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill.teacher_adapters import Adapters
from distill.teacher_files import Place
from distill.teacher_models import MAKING, Loader, Weights


class Residents:
    """Models by place. LoRA specialists of one base are one model."""

    def __init__(self, loader: Loader, *, capacity: int, max_bytes: float) -> None:
        """At most `capacity` bases of `max_bytes` in all, or one; and one that is read ahead."""
        self._loader = loader
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Path, tuple[Adapters, int]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-teacher")
        self._expected: tuple[Path, Future[Weights]] | None = None

    def __call__(self, place: Place) -> Any:
        """The causal language model, read now unless it is there; valid until the next call."""
        if place.base not in self._kept:
            self._make_room(self._capacity - 1, self._max_bytes)
            weights = self._read(place.base)
            # what was read ahead takes its room before the others' is known to be too much
            self._make_room(self._capacity - 1, self._max_bytes - weights.num_bytes)
            model = Adapters(self._loader.assemble(weights))
            self._kept[place.base] = model, weights.num_bytes
        self._kept.move_to_end(place.base)
        with MAKING:
            return self._kept[place.base][0].use(place.adapter)

    def expect(self, place: Place) -> None:
        """Read this one now, on the side, unless it is there: it will be asked for next."""
        is_coming = self._expected is not None and self._expected[0] == place.base
        if place.base in self._kept or is_coming:
            return
        self._expected = None  # what was read for nothing is let go
        if self._loader.can_read_ahead(place.base):
            self._expected = place.base, self._thread.submit(self._loader.read, place.base)

    def _read(self, base: Path) -> Weights:
        expected, self._expected = self._expected, None
        if expected and expected[0] == base:
            return expected[1].result()
        return self._loader.read(base)

    def _make_room(self, count: int, num_bytes: float) -> None:
        """Let the least recently used go until `count` of `num_bytes` are left."""
        before = len(self._kept)
        while self._kept and (
            len(self._kept) > count or sum(size for _, size in self._kept.values()) > num_bytes
        ):
            self._kept.popitem(last=False)
        if len(self._kept) < before:
            give_back()


def give_back() -> None:
    """What was let go goes back to the system: glibc keeps what one thread has allocated and
    another frees, and the next teacher would lie beside it."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
