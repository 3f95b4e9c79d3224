"""Tokens of a cache's slots in compiled loops, as many as there are: no place is filled up, and
what steps of the same slots share is looked up once.

A token's hidden state does not depend, to the bit, on the tokens beside it, nor on how its row was
cut into steps.

Legend: T tokens of a step, N slots that go on, n those that still do, S steps, H hidden size, r
rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import context_of
from posttrain.backbone.host import use_host_loops
from posttrain.backbone.routing import RouteTape

Ints = NDArray[np.int64]


def weights_for_loops(model: Any) -> Any:
    """A V4Model's weights as `feed` and `Ahead` take them; None: there are no loops for it."""
    if not use_host_loops(model.embed_tokens.weight):
        return None
    from posttrain.backbone.host.weights import weights_of  # imports numba

    return weights_of(model)


@torch.no_grad()
def feed(
    model: Any,
    weights: Any,
    cache: V4Cache,
    token_T: Ints,
    slot_T: Ints,
    place_T: Ints,
    tape: RouteTape | None = None,
) -> Tensor:
    """Hidden states (T, H), normalised, of tokens that the cache then holds, and has room for.

    Args:
        model: a V4Model; `weights`, its `weights_for_loops`.
        slot_T: each token's slot; those of a slot stand side by side, no more than the cache has
            spare places in its rings, and one.
        place_T: where in its row each token stands, behind what the slot holds and the last.
        tape: takes down the experts of the tokens.
    """
    from posttrain.backbone.host import arrays, step, threads

    total = len(token_T)
    context = context_of(model, cache, position_T=torch.from_numpy(place_T))
    # a slot's tokens see each other: they are one thread's
    (begin_N,) = np.nonzero(np.diff(slot_T, prepend=-1))
    parts = threads.even(total, weights.size)[:-1]
    ends = {int(begin_N[np.searchsorted(begin_N, end, "right") - 1]) for end in parts} - {0}
    hidden_TH = step.run_layers(
        model,
        weights,
        torch.from_numpy(token_T),
        arrays.Tokens(slot_T, place_T, np.ones(total, np.bool_)),
        {name: arrays.turns(rotation) for name, rotation in context.rotation_B.items()},
        step.past_of(cache),
        scaling=context.scaling,
        ends=[*sorted(ends), total],
        tape=tape,
    )
    cache.length_B = cache.length_B.index_add(
        0, torch.from_numpy(slot_T), torch.ones(total, dtype=torch.long)
    )
    return hidden_TH


class Ahead:
    """One token more for some slots, again and again; `close` when done, before the cache is used
    for anything else."""

    def __init__(
        self, model: Any, weights: Any, cache: V4Cache, slot_N: Sequence[int], num_steps: int
    ) -> None:
        """`num_steps` steps at most, for which the cache has room; the others as `feed`'s."""
        from posttrain.backbone.host import arrays, step

        self._model, self._weights, self._cache = model, weights, cache
        self._slot_N = np.array(slot_N)
        length_N = arrays.array(cache.length_B)[self._slot_N]
        self._place_SN = length_N + np.arange(num_steps)[:, None]
        context = context_of(model, cache, position_T=torch.from_numpy(self._place_SN.flatten()))
        self._turns = {
            name: arrays.turns(rotation).reshape(*self._place_SN.shape, -1, 2)
            for name, rotation in context.rotation_B.items()
        }
        self._past, self._scaling = step.past_of(cache), context.scaling
        self._row_n, self._fed_N, self._steps = np.arange(len(slot_N)), np.zeros_like(length_N), 0

    @torch.no_grad()
    def step(self, token_n: Tensor, tape: RouteTape | None = None) -> Tensor:
        """(n, H), normalised, of the rows that go on."""
        from posttrain.backbone.host.arrays import Tokens
        from posttrain.backbone.host.step import run_layers
        from posttrain.backbone.host.threads import even

        row_n, step = self._row_n, self._steps
        is_all = len(row_n) == len(self._slot_N)
        self._fed_N[row_n] += 1
        self._steps += 1
        return run_layers(
            self._model,
            self._weights,
            token_n,
            Tokens(self._slot_N[row_n], self._place_SN[step, row_n], np.ones(len(row_n), np.bool_)),
            {n: turn[step] if is_all else turn[step, row_n] for n, turn in self._turns.items()},
            self._past,
            scaling=self._scaling,
            ends=even(len(row_n), self._weights.size),
            tape=tape,
        )

    def keep(self, place_n: Ints) -> None:
        """Of the rows that go on, these alone do."""
        self._row_n = self._row_n[place_n]

    def close(self) -> list[int]:
        """Tell the cache how many tokens each slot was fed; they are returned."""
        slot_N, fed_N = torch.from_numpy(self._slot_N), torch.from_numpy(self._fed_N)
        self._cache.length_B = self._cache.length_B.index_add(0, slot_N, fed_N)
        return self._fed_N.tolist()
