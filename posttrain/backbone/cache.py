"""What V4 keeps of the past, by slot: a window ring, compressed entries, and the tokens not yet
compressed.

Every slot (row of a batch) has its own length, so rows start, stop, go back and are replaced on
their own. Token p stands at p % ring. A ring with `num_spare` tokens more than attention reads
still holds what the last `num_spare` tokens pushed out, so as many can be taken back exactly.

A token takes `bytes_per_token`: (head_dim + index_head_dim) / 4 values a CSA layer, head_dim / 128
an HCA layer at V4's rates; the rings do not grow.

Legend: B slots, R ring (window, or raw projections: m for HCA, 2m for CSA, one window back; plus
spare tokens), d head size, E entries there is room for, C channels of an entry, X projected
channels (C for HCA, 2C for CSA and its indexer), D slots of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

RECOUNT = 32
"""Decode steps after which an upper bound of the lengths is counted anew where that is a sync."""


class CompressedStore:
    """One compressor's entries (B, E, C) and the rings of raw projections they are made from."""

    def __init__(
        self,
        num_slots: int,
        size: int,
        rate: int,
        *,
        is_overlapping: bool,
        like: Tensor,
        num_spare: int = 0,
    ) -> None:
        self.rate, self.is_overlapping, self.num_spare = rate, is_overlapping, num_spare
        ring, width = (2 * rate, 2 * size) if is_overlapping else (rate, size)
        self.kv_BRX = like.new_zeros(num_slots, ring + num_spare, width)
        self.gate_BRX = like.new_zeros(num_slots, ring + num_spare, width)
        self.entry_BEC = like.new_zeros(num_slots, 0, size)

    @property
    def num_read(self) -> int:
        """Tokens of the ring that make an entry."""
        return self.kv_BRX.shape[1] - self.num_spare

    def reserve(self, num_tokens: int) -> None:
        """Room for the entries of `num_tokens` tokens a slot; zeros, which no token sees."""
        slots, room, size = self.entry_BEC.shape
        if num_tokens // self.rate > room:
            entry_BEC = self.entry_BEC.new_zeros(slots, num_tokens // self.rate, size)
            entry_BEC[:, :room] = self.entry_BEC
            self.entry_BEC = entry_BEC


class V4Cache(Cache):
    """The cache of all layers for `num_slots` rows; `length_B` counts the tokens each row holds.

    A `transformers.Cache`, so that `generate` takes it, with other contents: keys go in and out
    through V4's own layers, never through `update`.
    """

    def __init__(
        self, config: PreTrainedConfig, num_slots: int, *, like: Tensor, num_spare: int = 0
    ) -> None:
        """Empty slots on the device and in the dtype of `like`; `num_spare` tokens of each row can
        be taken back at any time."""
        super().__init__(layers=[])
        like = like.detach()
        self.window, self.num_spare, self.capacity = config.sliding_window, num_spare, 0
        self.num_columns = 0
        """Columns of the padded batch that forwards have fed; 0 where `prefill` filled the rows."""
        self.is_on_host = like.device.type == "cpu"
        """Lengths can be looked at without waiting for a device."""
        self._length_B = torch.zeros(num_slots, dtype=torch.long, device=like.device)
        self._reached_B = self._length_B.clone()
        self._longest, self._steps = 0, 0
        self._counted: tuple[int, int] | None = None
        self.window_BWd: list[Tensor] = []
        self.stores: list[dict[str, CompressedStore]] = []
        for kind in config.layer_types:
            ring = config.sliding_window + num_spare
            self.window_BWd.append(like.new_zeros(num_slots, ring, config.head_dim))
            self.stores.append(
                {
                    name: CompressedStore(
                        num_slots,
                        size,
                        config.compress_rates[kind],
                        is_overlapping=kind == "compressed_sparse_attention",
                        like=like,
                        num_spare=num_spare,
                    )
                    for name, size in entry_sizes(config, kind).items()
                }
            )

    @property
    def length_B(self) -> Tensor:
        """(B,) int64, tokens that each row holds."""
        return self._length_B

    @length_B.setter
    def length_B(self, length_B: Tensor) -> None:
        self._length_B, self._counted = length_B, None

    @property
    def num_slots(self) -> int:
        return len(self._length_B)

    def compressed(self, layer: int, name: str) -> CompressedStore:
        return self.stores[layer][name]

    def reserve(self, num_tokens: int) -> None:
        """Room for rows of `num_tokens` tokens. What is there at least doubles when it grows, so
        that a token costs one copy on average, however the calls are cut."""
        if num_tokens > self.capacity:
            self.capacity = max(num_tokens, 2 * self.capacity)
            for stores in self.stores:
                for store in stores.values():
                    store.reserve(self.capacity)

    def advance(self, is_live_B: Tensor) -> None:
        """One token more in the live rows, (B,) bool or 0/1; no wait for the device."""
        is_counted = self._counted is not None and self._counted == _state(self._length_B)
        self.length_B = self._length_B + is_live_B
        self._steps += 1
        if is_counted and self._steps < RECOUNT:
            self._longest += 1
            self._counted = _state(self._length_B)

    def longest(self) -> int:
        """The tokens of the longest row, or a few more on a device that would have to be waited
        for: steps since the last count are added to it."""
        is_counted = self._counted is not None and self._counted == _state(self._length_B)
        if not is_counted or self.is_on_host:
            self._longest = int(self._length_B.max()) if self.num_slots else 0
            self._counted, self._steps = _state(self._length_B), 0
        return self._longest

    def take_back(self, num_tokens: int | Tensor) -> None:
        """Forget the last tokens, so many of every row or (B,) of each: what follows is as if they
        had never been there.

        Raises:
            ValueError: more than `num_spare` tokens behind the furthest that a row has been, more
            than it holds, or fewer than none.
        """
        if bool((torch.as_tensor(num_tokens) < 0).any()):
            raise ValueError(f"take_back({num_tokens}): give the number of tokens, 0 or more")
        self._reached_B = torch.maximum(self._reached_B, self._length_B)
        left_B = self._length_B - num_tokens
        least_B = (self._reached_B - self.num_spare).clamp(min=0)
        # an empty row of a batch has nothing to take back and nothing to lose
        wrong = ((left_B < least_B) & (self._length_B > 0)).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(
                f"row {row} would go back to {int(left_B[row])} tokens, but it has been at "
                f"{int(self._reached_B[row])} and the cache keeps {self.num_spare} spare tokens, "
                f"so {int(least_B[row])} is the least: make V4Cache(num_spare=...) larger"
            )
        self._length_B = left_B.clamp(min=0)

    def crop(self, tokens_to_remove: int) -> None:
        """`take_back` as transformers says it: -3 takes the last three columns of every row."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of columns to remove as a negative "
                "number, or call take_back"
            )
        if tokens_to_remove:
            columns = self.get_seq_length()
            self.take_back(-tokens_to_remove)
            self.num_columns = columns + tokens_to_remove

    def release(self, slots_D: Tensor) -> None:
        """Empty these slots: lengths and all that they hold are zero, so that not even a NaN of
        the old row reaches the next."""
        for x in self._tensors():
            x[slots_D] = 0
        self._length_B = self._length_B.index_fill(0, slots_D, 0)
        self._reached_B = self._reached_B.index_fill(0, slots_D, 0)

    def copy_slots(self, source_D: Tensor, target_D: Tensor, *, of: V4Cache | None = None) -> None:
        """Make the target slots what the source slots are, here or of a like cache with as much
        room: one prefill for many samples."""
        of = of or self
        pairs = zip(self._tensors(), of._tensors(), strict=True)
        for x, y in (*pairs, (self._reached_B, of._reached_B)):
            x[target_D] = y[source_D]
        self._length_B = self._length_B.index_copy(0, target_D, of._length_B[source_D])

    def reorder(self, index: Tensor) -> None:
        """Slot i becomes what slot index[i] was; any number of slots, with repeats."""
        self._each(lambda x: x.index_select(0, index.to(x.device)))

    @property
    def nbytes(self) -> int:
        """Bytes of all that grows with layers and slots (not the lengths, 16 bytes a slot)."""
        return sum(x.nbytes for x in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.window_BWd
        for stores in self.stores:
            for store in stores.values():
                yield from (store.kv_BRX, store.gate_BRX, store.entry_BEC)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put change(x) in the place of every tensor by slot."""
        self.window_BWd = [change(x) for x in self.window_BWd]
        for stores in self.stores:
            for store in stores.values():
                store.kv_BRX, store.gate_BRX = change(store.kv_BRX), change(store.gate_BRX)
                store.entry_BEC = change(store.entry_BEC)
        self._length_B, self._reached_B = change(self._length_B), change(self._reached_B)

    # What transformers' GenerationMixin asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded batch fed so far; rows hold fewer tokens where they were padded.
        Rows that `prefill` filled are as if left padded to the longest."""
        return self.num_columns or self.longest()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        is_mask = indices.dtype == torch.bool
        self.reorder(indices.nonzero().flatten() if is_mask else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Empty every slot; the room stays."""
        self.release(torch.arange(self.num_slots, device=self._length_B.device))
        self.num_columns = 0

    def activate_past_recording(self) -> None:
        """Nothing to start: `num_spare` tokens are always on record."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError("V4Cache is filled by V4Model's layers, not by Cache.update")

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.window_BWd)

    def __repr__(self) -> str:
        return f"V4Cache({self.num_slots} slots, {len(self)} layers, {self.nbytes} bytes)"

    @property
    def batch_size(self) -> int:
        return self.num_slots

    @property
    def is_compileable(self) -> bool:
        """False: `generate` compiles whole forwards; `decode.compiled_decode` compiles a step."""
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return self.num_spare > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)


def _state(length_B: Tensor) -> tuple[int, int] | None:
    """What changes when the lengths are written in place; None where torch does not tell."""
    return None if length_B.is_inference() else (id(length_B), length_B._version)


def entry_sizes(config: PreTrainedConfig, kind: str) -> dict[str, int]:
    """Channels of an entry, by the stores that a layer of this kind has."""
    sizes = {} if kind == "sliding_attention" else {"compressor": config.head_dim}
    return sizes | (
        {"indexer": config.index_head_dim} if kind == "compressed_sparse_attention" else {}
    )


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """sum over layers of (channels of an entry) / rate * itemsize: what a further token adds."""
    return sum(
        size / config.compress_rates[kind] * dtype.itemsize
        for kind in config.layer_types
        for size in entry_sizes(config, kind).values()
    )


def cache_bytes(
    config: PreTrainedConfig,
    num_slots: int,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    num_spare: int = 0,
) -> int:
    """`V4Cache.nbytes` with room for `num_tokens` a slot:

    slots * itemsize * sum over layers [ (window + spare) d + sum over stores (
        2 (ring + spare) X + (tokens // m) C ) ],   ring = m, X = C (HCA) or 2m, 2C (CSA).
    """
    values = 0
    for kind in config.layer_types:
        values += (config.sliding_window + num_spare) * config.head_dim
        twice = 2 if kind == "compressed_sparse_attention" else 1
        for size in entry_sizes(config, kind).values():
            rate = config.compress_rates[kind]
            values += 2 * (twice * rate + num_spare) * twice * size + num_tokens // rate * size
    return num_slots * values * dtype.itemsize
