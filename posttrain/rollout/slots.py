"""The slots of a V4 model: what the engine asks of a model, on the slot cache.

In compiled loops a step is of the tokens alone (posttrain/backbone/feed.py). In torch it reaches
from the first slot to the highest that decodes, and is filled up to whole blocks of 16, as are the
rows of the head in both: then no row's bits depend on the others (posttrain/backbone/chunks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone import V4Cache
from posttrain.backbone.chunks import Chunk, room_for, step
from posttrain.backbone.decode_keys import whole
from posttrain.backbone.feed import Ahead, feed, weights_for_loops
from posttrain.backbone.routing import RouteTape

COLUMNS = 16
"""Tokens of a row in a chunk, at most; in torch a prompt's last chunk is filled up to so many."""


class V4Slots:
    """Rows of tokens in slots, and one prompt on the shelf to be copied from."""

    def __init__(self, model: Any, num_slots: int) -> None:
        self._model, num_slots = model, whole(num_slots)
        window = model.config.sliding_window
        self._num_spare = whole(window + COLUMNS - 1) - window
        self._cache, self._shelf = self._new_cache(num_slots), self._new_cache(1)
        self._held = [0] * num_slots
        self._held_on_shelf = 0

    def step(
        self,
        live: Mapping[int, int],
        reading: Sequence[tuple[int, Sequence[int]]],
        *,
        wants_routes: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """Feed a token to each live slot, and further tokens, `COLUMNS` at most, to those that
        read.

        Returns: the logits after the last token of each, (rows, V), in that order, the live slots
        ascending; rows are filled up to whole blocks. And where wanted, each one's experts as numpy
        (tokens, layers, experts a token).
        """
        fed = [(slot, [live[slot]]) for slot in sorted(live)] + list(reading)
        lengths = [len(ids) for _, ids in fed]
        tape = RouteTape(len(self._model.model.layers)) if wants_routes else None
        weights = weights_for_loops(self._model.model)
        if weights is not None:
            hidden_TH, places = self._in_loops(weights, fed, tape), np.cumsum(lengths) - 1
        else:
            hidden_TH = self._in_torch(live, reading, tape)
            first = len(hidden_TH) - COLUMNS * len(reading)
            ends = [first + row * COLUMNS + len(ids) - 1 for row, (_, ids) in enumerate(reading)]
            places = [*sorted(live), *ends]
        for slot, ids in fed:
            self._held[slot] += len(ids)
        place_N = torch.from_numpy(np.resize(places, whole(len(places))))
        logits = self._model.lm_head(hidden_TH[place_N.to(hidden_TH.device)])
        return logits, _routes(tape, lengths)

    def _in_loops(
        self, weights: Any, fed: Sequence[tuple[int, Sequence[int]]], tape: RouteTape | None
    ) -> Tensor:
        """Hidden states (T, H) of the tokens alone."""
        self._reserve(max(self._held[slot] + len(ids) for slot, ids in fed))
        rows = [range(self._held[slot], self._held[slot] + len(ids)) for slot, ids in fed]
        return feed(
            self._model.model,
            weights,
            self._cache,
            np.fromiter(chain.from_iterable(ids for _, ids in fed), np.int64),
            np.repeat([slot for slot, _ in fed], [len(ids) for _, ids in fed]),
            np.fromiter(chain.from_iterable(rows), np.int64),
            tape,
        )

    def _in_torch(
        self,
        live: Mapping[int, int],
        reading: Sequence[tuple[int, Sequence[int]]],
        tape: RouteTape | None,
    ) -> Tensor:
        """Hidden states (T, H) of a token in every slot up to the highest that is live, then of
        `COLUMNS` places for each row that reads."""
        slots, token_B, is_live_B = sorted(live), None, None
        if slots:
            fed_2B = np.zeros((2, whole(slots[-1] + 1)), np.int64)  # numpy takes lists faster
            fed_2B[0, slots], fed_2B[1, slots] = [live[slot] for slot in slots], 1
            token_B, is_live_B = torch.from_numpy(fed_2B).to(self._model.device)
        reach = max(
            [self._held[slot] + 1 for slot in slots]
            + [self._held[slot] + COLUMNS for slot, _ in reading]
        )
        self._reserve(reach)
        return step(
            self._model.model,
            self._cache,
            token_B=token_B,
            is_live_B=is_live_B,
            chunk=self._chunk(reading) if reading else None,
            reach=reach,
            tape=tape,
        )

    def _reserve(self, num_tokens: int) -> None:
        """Room for rows of so many tokens, in whole blocks of entries."""
        if num_tokens > self._cache.capacity:
            self._cache.reserve(room_for(self._model.config, num_tokens))

    def ahead(self, slots: Sequence[int], num_steps: int) -> SlotsAhead | None:
        """These slots' next tokens, `num_steps` at most; None: there are no loops for it."""
        model, weights = self._model.model, weights_for_loops(self._model.model)
        if weights is None:
            return None
        self._reserve(max(self._held[slot] for slot in slots) + num_steps)
        steps = Ahead(model, weights, self._cache, slots, num_steps)
        return SlotsAhead(self._model, steps, slots, self._held)

    def _chunk(self, reading: Sequence[tuple[int, Sequence[int]]]) -> Chunk:
        rows = len(reading)
        ids_DC = np.zeros((rows, COLUMNS), np.int64)
        length_D, slot_D = np.zeros((2, rows), np.int64)
        for row, (slot, ids) in enumerate(reading):
            ids_DC[row, : len(ids)], length_D[row], slot_D[row] = ids, len(ids), slot
        device = self._model.device
        return Chunk(*(torch.from_numpy(x).to(device) for x in (ids_DC, length_D, slot_D)))

    def release(self, slots: Sequence[int]) -> None:
        """Empty these slots."""
        self._cache.release(torch.tensor(slots, device=self._model.device))
        for slot in slots:
            self._held[slot] = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each target what its source slot is."""
        self._copy(self._cache, sources, self._cache, targets)
        for source, target in zip(sources, targets, strict=True):
            self._held[target] = self._held[source]

    def shelve(self, slot: int) -> None:
        """Keep what the slot is, in the place of what was kept before."""
        self._copy(self._cache, [slot], self._shelf, [0])
        self._held_on_shelf = self._held[slot]

    def unshelve(self, slots: Sequence[int]) -> None:
        """Make these slots what was kept."""
        self._copy(self._shelf, [0] * len(slots), self._cache, slots)
        for slot in slots:
            self._held[slot] = self._held_on_shelf

    def _copy(
        self, source: V4Cache, sources: Sequence[int], target: V4Cache, targets: Sequence[int]
    ) -> None:
        target.reserve(source.capacity)
        source.reserve(target.capacity)
        device = self._model.device
        at, to = (torch.tensor(list(x), device=device) for x in (sources, targets))
        target.copy_slots(at, to, of=source)

    def _new_cache(self, num_slots: int) -> V4Cache:
        like = self._model.lm_head.weight
        return V4Cache(self._model.config, num_slots, like=like, num_spare=self._num_spare)


class SlotsAhead:
    """Step after step of some slots; `close` before the slots are used for anything else."""

    def __init__(self, model: Any, steps: Ahead, slots: Sequence[int], held: list[int]) -> None:
        self._model, self._steps, self._held = model, steps, held
        self._slots = list(slots)
        self.keep = steps.keep

    def step(self, token_n: Tensor, *, wants_routes: bool = False) -> tuple[Tensor, list[Any]]:
        """As `V4Slots.step`, of a token for each slot that goes on."""
        tape = RouteTape(len(self._model.model.layers)) if wants_routes else None
        hidden_nH = self._steps.step(token_n, tape)
        if missing := whole(len(token_n)) - len(token_n):
            hidden_nH = F.pad(hidden_nH, (0, 0, 0, missing))
        logits = self._model.lm_head(hidden_nH)
        return logits, _routes(tape, [1] * len(token_n))

    def close(self) -> None:
        for slot, fed in zip(self._slots, self._steps.close(), strict=True):
            self._held[slot] += fed


def _routes(tape: RouteTape | None, counts: Sequence[int]) -> list[Any]:
    if tape is None:
        return []
    expert_TLk = tape.choices.expert_LTk.transpose(0, 1).to(torch.int16).cpu().numpy()
    return np.split(expert_TLk, np.cumsum(counts)[:-1])
