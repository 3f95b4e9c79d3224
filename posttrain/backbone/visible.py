"""Which keys each query attends to, query tile by query tile.

A tile reads its window and its entries alone. Where a query may see more entries than the indexer's
top-k, its tile either masks all visible ones or, when they are many times as many, gathers the
chosen.

Legend: D documents, L tokens, Q of them in a tile, J = P + L window keys (P from a cache), E
entries, K chosen entries, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.backbone import indexer

GATHER = 8
"""From so many times top-k visible entries on, gathering the chosen beats masking the rest."""


@dataclass(frozen=True)
class Layout:
    """What of a group of rows is visible to whom."""

    length_D: Tensor
    start_D: Tensor | None
    """Tokens before the first of these, by row; None: none."""
    longest_start: int
    window: int
    num_past: int
    """P: window keys from a cache, in front of the new ones."""
    rate: int
    """Tokens an entry; 0: the layer has no entries."""

    def position_DQ(self, first: int, end: int) -> Tensor:
        """Absolute positions of queries first .. end - 1, (D or 1, Q)."""
        place_1Q = torch.arange(first, end, device=self.length_D.device)[None]
        return place_1Q if self.start_D is None else place_1Q + self.start_D[:, None]

    def window_range(self, first: int, end: int) -> tuple[int, int]:
        """The window keys that a tile's queries can see, as a range of J."""
        return max(0, first + self.num_past - self.window + 1), end + self.num_past

    def window_mask(self, first: int, end: int) -> Tensor:
        """(D or 1, Q, keys of the range)."""
        low, high = self.window_range(first, end)
        device = self.length_D.device
        query_Q1 = torch.arange(first, end, device=device)[:, None] + self.num_past
        key_J = torch.arange(low, high, device=device)
        distance = query_Q1 - key_J
        mask = ((distance >= 0) & (distance < self.window))[None]
        if self.start_D is None:
            return mask
        return mask & (key_J + (self.start_D[:, None, None] - self.num_past) >= 0)

    def num_visible(self, end: int, num_entries: int) -> int:
        """Entries that any query before `end` sees."""
        if not self.rate:
            return 0
        return min(num_entries, (self.longest_start + end) // self.rate)

    def entry_mask(self, first: int, end: int, num_entries: int) -> Tensor:
        """(D or 1, Q, num_entries): query t sees entry w iff w < (t + 1) // rate."""
        seen = (self.position_DQ(first, end) + 1) // max(self.rate, 1)
        return torch.arange(num_entries, device=seen.device) < seen[..., None]

    def has_query(self, first: int, end: int) -> Tensor:
        """(D, Q): real queries that see at least one entry."""
        place_Q = torch.arange(first, end, device=self.length_D.device)
        sees = self.position_DQ(first, end) + 1 >= self.rate
        return (place_Q < self.length_D[:, None]) & sees


@dataclass(frozen=True)
class Chosen:
    """The entries of a tile's queries: shared (D, K, d) under a mask, or gathered (D, Q, K, d)."""

    mask: Tensor
    """(D or 1, Q, K)."""
    index_DQK: Tensor | None = None
    """Gathered entries by number; None: the first K."""
    is_all: bool = False
    """All visible ones: the mask follows from the tile's place."""

    def of(self, entry_DEx: Tensor) -> Tensor:
        """The entries themselves, or the indexer's keys of them."""
        if self.index_DQK is None:
            return entry_DEx[:, : self.mask.shape[-1]]
        row_D11 = torch.arange(len(entry_DEx), device=entry_DEx.device)[:, None, None]
        return entry_DEx[row_D11, self.index_DQK]

    def add_to(self, grad_DEx: Tensor, grad: Tensor) -> None:
        """Add what the entries of `of` got to the gradient of all."""
        if self.index_DQK is None:
            grad_DEx[:, : self.mask.shape[-1]] += grad
            return
        rows, num_entries, _ = grad_DEx.shape
        first_D11 = torch.arange(rows, device=grad.device)[:, None, None] * num_entries
        flat = (self.index_DQK + first_D11).flatten()
        grad_DEx.flatten(0, 1).index_add_(0, flat, grad.flatten(0, 2).to(grad_DEx.dtype))


@dataclass(frozen=True)
class Tile:
    """What the queries first .. end - 1 attend to."""

    first: int
    end: int
    window_range: tuple[int, int]
    window_mask: Tensor
    """(D or 1, Q, keys of the range)."""
    chosen: Chosen | None


def choose(
    layout: Layout, first: int, end: int, num_entries: int, index: indexer.Index | None
) -> Chosen | None:
    """Which entries a tile's queries attend to; ties go to the lowest number on every path."""
    seen = layout.num_visible(end, num_entries)
    if not seen:
        return None
    mask = layout.entry_mask(first, end, seen)
    if index is None or seen <= index.top_k:
        return Chosen(mask, is_all=True)
    score_DQE = index.scores(first, end, seen).masked_fill_(~mask, float("-inf"))
    if seen < GATHER * index.top_k:
        return Chosen(indexer.top_k_mask(score_DQE, index.top_k) & mask)
    number = indexer.top_k_numbers(score_DQE, index.top_k)
    return Chosen(number >= 0, number.clamp(min=0))


def tiles(
    layout: Layout, length: int, size: int, num_entries: int, index: indexer.Index | None
) -> Iterator[Tile]:
    """The tiles of `length` queries, `size` in each."""
    for first in range(0, length, size):
        end = min(first + size, length)
        chosen = choose(layout, first, end, num_entries, index)
        mask = layout.window_mask(first, end)
        yield Tile(first, end, layout.window_range(first, end), mask, chosen)


Place = tuple[int, int, "int | None"]
"""A tile's first and last query, and how many entries it sees where it attends to all of them."""


def compact(tile: Tile) -> tuple[Place, Tensor | None]:
    """A tile in few bytes, from forward to backward: its place, and of chosen entries a mask or
    their numbers, -1 for none."""
    chosen = tile.chosen
    if chosen is None:
        return (tile.first, tile.end, None), None
    if chosen.is_all:
        return (tile.first, tile.end, chosen.mask.shape[-1]), None
    if chosen.index_DQK is None:
        return (tile.first, tile.end, None), chosen.mask
    number = chosen.index_DQK.masked_fill(~chosen.mask, -1)
    return (tile.first, tile.end, None), number.to(torch.int32)


def restored(place: Place, entries: Tensor | None, layout: Layout) -> Tile:
    """The tile that `compact` was given."""
    first, end, count = place
    chosen = None
    if count is not None:
        chosen = Chosen(layout.entry_mask(first, end, count), is_all=True)
    elif entries is not None and entries.dtype == torch.bool:
        chosen = Chosen(entries)
    elif entries is not None:
        chosen = Chosen(entries >= 0, entries.long().clamp_(min=0))
    mask = layout.window_mask(first, end)
    return Tile(first, end, layout.window_range(first, end), mask, chosen)
