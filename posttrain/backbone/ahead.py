"""Steps of the same rows one after the other, in compiled loops: what the steps share is looked up
once, and nothing is computed for a slot that has no token.

Legend: N rows that go on, S steps, H hidden size, r rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import context_of
from posttrain.backbone.host import use_host_loops
from posttrain.backbone.routing import RouteTape


class Ahead:
    """One token more for some slots, again and again; `close` when done, before the cache is used
    for anything else. A token's hidden state is, to the bit, `chunks.step`'s."""

    def __init__(
        self, model: Any, cache: V4Cache, weights: Any, slot_N: Sequence[int], num_steps: int
    ) -> None:
        """`num_steps` steps at most; the cache has room for them."""
        from posttrain.backbone.host import arrays, step  # imports numba

        self._model, self._cache, self._weights = model, cache, weights
        self._slot_N = np.array(slot_N)
        length_N = arrays.array(cache.length_B)[self._slot_N]
        place_SN = torch.from_numpy(length_N + np.arange(num_steps)[:, None])
        context = context_of(model, cache, position_T=place_SN.flatten())
        self._turns = {
            name: arrays.turns(rotation).reshape(*place_SN.shape, -1, 2)
            for name, rotation in context.rotation_B.items()
        }
        self._place_SN, self._scaling = place_SN.numpy(), context.scaling
        self._past = step.past_of(cache)
        self._row_n, self._fed_N, self._steps = np.arange(len(slot_N)), np.zeros_like(length_N), 0

    @torch.no_grad()
    def step(self, token_n: Tensor, tape: RouteTape | None = None) -> Tensor:
        """(n, H), normalised, of the rows that go on."""
        from posttrain.backbone.host.arrays import Tokens
        from posttrain.backbone.host.step import run_layers
        from posttrain.backbone.host.threads import even

        row_n, step = self._row_n, self._steps
        is_all = len(row_n) == len(self._slot_N)
        tokens = Tokens(
            self._slot_N[row_n], self._place_SN[step, row_n], np.ones(len(row_n), np.bool_)
        )
        self._fed_N[row_n] += 1
        self._steps += 1
        return run_layers(
            self._model,
            self._weights,
            token_n,
            tokens,
            {n: turn[step] if is_all else turn[step, row_n] for n, turn in self._turns.items()},
            self._past,
            scaling=self._scaling,
            ends=even(len(row_n), self._weights.size),
            tape=tape,
        )

    def keep(self, place_n: Any) -> None:
        """Of the rows that go on, these alone do, (n,) numpy int64."""
        self._row_n = self._row_n[place_n]

    def close(self) -> list[int]:
        """Tell the cache how many tokens each slot was fed; they are returned."""
        slot_N, fed_N = torch.from_numpy(self._slot_N), torch.from_numpy(self._fed_N)
        self._cache.length_B = self._cache.length_B.index_add(0, slot_N, fed_N)
        return self._fed_N.tolist()


def ahead(model: Any, cache: V4Cache, slots: Sequence[int], num_steps: int) -> Ahead | None:
    """Of a V4Model; the cache has room for `num_steps` tokens more. None: there are no loops for
    it."""
    if not use_host_loops(model.embed_tokens.weight):
        return None
    from posttrain.backbone.host.weights import weights_of

    weights = weights_of(model)
    return Ahead(model, cache, weights, slots, num_steps) if weights is not None else None
