"""What rows sample with: where each is in its own stream of numbers, its temperature, its cuts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.backbone.decode_keys import whole
from posttrain.rollout.row import Row
from posttrain.rollout.sampling import Draw, sample, uniform


class Draws:
    """A token of each of these rows, then the next. As all that is computed by row it is in whole
    blocks of rows; those past the last are the last again."""

    def __init__(self, rows: Sequence[Row]) -> None:
        requests = [row.request for row in rows]
        self._key_X = np.array([row.key for row in rows], np.uint64)
        self._place_X = np.array([len(row.response) for row in rows], np.uint64)
        columns = {
            "temperature_B": (np.array([r.temperature for r in requests], np.float64), 1),
            "top_p_B": (np.array([r.top_p for r in requests], np.float64), 1),
            "top_k_B": (np.array([r.top_k for r in requests], np.int64), 0),
        }
        self._columns = {name: x for name, (x, usual) in columns.items() if (x != usual).any()}
        self.keep(np.arange(len(rows)))

    def draw(self, logits_XV: Tensor) -> Draw:
        """From the rows' logits, in whole blocks or not."""
        missing, device = len(self._key_X) - len(logits_XV), logits_XV.device
        if missing:
            logits_XV = torch.cat([logits_XV, logits_XV[-1:].expand(missing, -1)])
        uniform_X = torch.from_numpy(uniform(self._key_X, self._place_X)).to(device)
        columns = {name: torch.from_numpy(x).to(device) for name, x in self._columns.items()}
        self._place_X += np.uint64(1)
        return sample(logits_XV, uniform_X, **columns)

    def keep(self, place_b: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Go on with these rows alone."""
        index = np.resize(place_b, whole(len(place_b)))
        index[len(place_b) :] = place_b[-1]
        self._key_X, self._place_X = self._key_X[index], self._place_X[index]
        self._columns = {name: x[index] for name, x in self._columns.items()}
