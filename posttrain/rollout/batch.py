"""The rows in the slots: who is taken in, who is fed what, whose next token is due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.decode_keys import whole
from posttrain.rollout.row import Row


@dataclass(frozen=True)
class Shelf:
    """A prompt that was read and whose further samples have no slot yet."""

    row: Row
    logits_V: Tensor
    routes: list[Any]


class Batch:
    """Rows from `waiting` in `num_slots` slots. Samples of one prompt read it once."""

    def __init__(self, slots: Any, num_slots: int, waiting: Iterable[Row]) -> None:
        self._slots = slots
        self._waiting = Peekable(iter(waiting))
        self._free = list(range(num_slots))
        self.rows: dict[int, Row] = {}
        self._leader: dict[int, Row] = {}
        """By the slot of a row that waits for another to read their prompt."""
        self._shelf: Shelf | None = None

    @property
    def is_empty(self) -> bool:
        return not self.rows and not self.has_waiting

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for a slot."""
        return self._waiting.peek() is not None

    def admit(self) -> list[Row]:
        """Fill the free slots. Gives out rows that had ended before."""
        if not self.has_waiting:
            self._close_up()
        ended: list[Row] = []
        taken: list[Row] = []
        while (row := self._waiting.peek()) is not None and (self._free or row.is_done):
            self._waiting.take()
            if row.is_done:
                ended.append(row)
                continue
            row.slot = heappop(self._free)
            taken.append(row)
        if taken:
            self._slots.release([row.slot for row in taken])
        for row in taken:
            if not row.response and not self._is_shelved(row):
                leader = self._reader_for(row)
                if leader is not None:
                    self._leader[row.slot] = leader
            self.rows[row.slot] = row
        return ended

    def _close_up(self) -> None:
        """Move rows down where that leaves a block of slots empty: a step reaches up to the highest
        that decodes."""
        end = whole(len(self.rows))
        sources = [slot for slot in self.rows if slot >= end]
        if not sources:
            return
        targets = [heappop(self._free) for _ in sources]
        self._slots.copy(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            row = self.rows[target] = self.rows.pop(source)
            row.slot = target
            if source in self._leader:
                self._leader[target] = self._leader.pop(source)
            heappush(self._free, source)

    def _reader_for(self, row: Row) -> Row | None:
        """The row that reads what `row` would read."""
        for reader in self.rows.values():
            if (
                same_prompt(reader, row)
                and reader.is_reading_prompt
                and reader.slot not in self._leader
            ):
                return reader
        return None

    def due(self, num_columns: int, num_rows: int) -> tuple[dict[int, int], list[tuple[Row, int]]]:
        """The token to feed to each slot that decodes; the rows that read, `num_rows` at most, and
        how many tokens each."""
        live: dict[int, int] = {}
        reading: list[tuple[Row, int]] = []
        for slot, row in self.rows.items():
            if row.is_turn_over or slot in self._leader or self._is_shelved(row):
                continue
            if len(row.unread) == 1:
                live[slot] = row.unread[0]
            elif len(reading) < num_rows:
                reading.append((row, min(len(row.unread), num_columns)))
        return live, reading

    def fed(
        self,
        live: Iterable[int],
        reading: Sequence[tuple[Row, int]],
        logits_NV: Tensor | None,
        routes: Sequence[Any],
    ) -> tuple[list[Row], Tensor | None]:
        """The rows whose next token is due after a step, and their logits (rows, V). None where
        nothing was fed, or nothing is due."""
        rows = [(self.rows[slot], 1) for slot in sorted(live)] + list(reading)
        for (row, _), experts in zip(rows, routes, strict=False):
            if row.request.wants_routes:
                row.routes.append(experts)
        due: list[tuple[Row, int]] = []
        for place, (row, count) in enumerate(rows):
            is_prompt = row.is_reading_prompt
            del row.unread[:count]
            if row.unread or row.finish_reason:
                continue
            due.append((row, place))
            if is_prompt:
                due += [(other, place) for other in self._follow(row)]
                following = self._waiting.peek()
                is_same = following is not None and same_prompt(row, following)
                if is_same and following is not None and not following.response:
                    assert logits_NV is not None
                    self._slots.shelve(row.slot)
                    self._shelf = Shelf(row, logits_NV[place].clone(), list(row.routes))
        return self._with_shelved(due, logits_NV)

    def _follow(self, leader: Row) -> list[Row]:
        """The rows that waited for `leader`, now where it is."""
        slots = [slot for slot, row in self._leader.items() if row is leader]
        if slots:
            self._slots.copy([leader.slot] * len(slots), slots)
        for slot in slots:
            del self._leader[slot]
            self.rows[slot].unread, self.rows[slot].routes = [], list(leader.routes)
        return [self.rows[slot] for slot in slots]

    def _is_shelved(self, row: Row) -> bool:
        shelf = self._shelf
        return shelf is not None and row.is_reading_prompt and same_prompt(shelf.row, row)

    def _with_shelved(
        self, due: list[tuple[Row, int]], logits_NV: Tensor | None
    ) -> tuple[list[Row], Tensor | None]:
        """With the rows whose prompt is on the shelf, now there."""
        shelved, parts = [row for row in self.rows.values() if self._is_shelved(row)], []
        if logits_NV is not None:
            places = [place for _, place in due]
            is_first = places == list(range(len(places)))
            parts.append(logits_NV[: len(places)] if is_first else logits_NV[places])
        if shelved and self._shelf is not None:
            self._slots.unshelve([row.slot for row in shelved])
            for row in shelved:
                row.unread, row.routes = [], list(self._shelf.routes)
            parts.append(self._shelf.logits_V.expand(len(shelved), -1))
        rows = [*(row for row, _ in due), *shelved]
        return rows, torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)

    def ended(self) -> list[Row]:
        """Rows that have ended; their slots are free."""
        found = [row for row in self.rows.values() if row.is_done]
        for row in found:
            del self.rows[row.slot]
            heappush(self._free, row.slot)
        return found

    def answered(self) -> list[Row]:
        """Rows to which something has been said."""
        return [row for row in self.rows.values() if row.answer is not None and row.answer.done()]

    def wait_for_answer(self) -> None:
        """Until something has been said to one of those that ask, if any do."""
        asked = [row.answer for row in self.rows.values() if row.answer is not None]
        if asked:
            wait(asked, return_when=FIRST_COMPLETED)

    def forget_weights(self, *, rereads: bool) -> None:
        """The weights have changed; `rereads`: all rows begin again with what they have."""
        self._shelf = None
        if rereads:
            self._slots.release(list(self.rows))
            for row in self.rows.values():
                if not row.is_done:
                    row.unread, row.routes = row.tokens, []


def same_prompt(one: Row, other: Row) -> bool:
    a, b = one.request, other.request
    return a.prompt == b.prompt and a.wants_routes == b.wants_routes


class Peekable:
    """An iterator whose next row can be looked at."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows, self._next, self._is_done = rows, None, False

    def peek(self) -> Row | None:
        if self._next is None and not self._is_done:
            self._next = next(self._rows, None)
            self._is_done = self._next is None
        return self._next

    def take(self) -> None:
        self._next = None
