"""The indexer's choices of one run, given again in another where rounding may decide otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.backbone import decode_keys, indexer

CLOSE = 1e-5
"""A lead over the best entry left out that rounding may turn."""


class Selections:
    """Watches every choice. Queries are found again by their scores, since a batch groups its
    documents in an order of its own."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = torch.Generator().manual_seed(0), noise
        """As much as another order of sums might change a score that is not 0."""
        self.is_replaying = False
        self.num_choices = 0
        """Of queries that see more entries than they may choose, in the run that replays."""
        self.num_close = 0
        self._scores: list[Tensor] = []
        self._masks: list[Tensor] = []

    def replay(self) -> None:
        """From here on choices are those that were made so far, where they are close."""
        self.is_replaying = True

    def rounded(self, score: Tensor) -> Tensor:
        """With noise, of which the search knows nothing."""
        generator, most = self.noise
        change = (torch.rand(score.shape, generator=generator) - 0.5) * 2 * most
        return torch.where(score == 0, score, score + change)

    def mask(self, score: Tensor, rounded: Tensor, mask: Tensor) -> Tensor:
        """What is to be chosen of (..., E), -inf being hidden, where `mask` would be."""
        masks = mask.flatten(0, -2).clone()
        rows = zip(*(x.detach().flatten(0, -2) for x in (score, rounded)), masks, strict=True)
        for row, (exact, values, chosen) in enumerate(rows):
            visible = ~values.isneginf()
            if not self.is_replaying:
                self._scores.append(exact[visible])
                self._masks.append(chosen[visible])
            elif bool((visible & ~chosen).any()):
                self.num_choices += 1
                lead = values[chosen][:, None] - values[visible & ~chosen]
                if bool(((lead > 0) & (lead < CLOSE)).any()):  # equals: the lowest, everywhere
                    self.num_close += 1
                    masks[row, visible] = self._earlier(exact[visible])
        return masks.view_as(mask)

    def _earlier(self, values: Tensor) -> Tensor:
        """The choice that was made of the same scores, but for rounding."""
        gaps = [
            float((values - other).abs().max()) if len(other) == len(values) else float("inf")
            for other in self._scores
        ]
        place = min(range(len(gaps)), key=gaps.__getitem__)
        assert gaps[place] < CLOSE, "a query that the first run did not have"
        return self._masks[place]


def watch(monkeypatch: pytest.MonkeyPatch, noise: float = 0.0) -> Selections:
    """Of full forwards and of decode steps in torch."""
    watched, in_mask, in_best = Selections(noise), indexer.top_k_mask, decode_keys.best

    def top_k_mask(score: Tensor, top_k: int) -> Tensor:
        rounded = watched.rounded(score)
        return watched.mask(score, rounded, in_mask(rounded, top_k))

    def top_k_numbers(score: Tensor, top_k: int) -> Tensor:
        return indexer.numbers(top_k_mask(score, top_k) & ~score.isneginf(), top_k)

    def best(score_BE: Tensor, top_k: int) -> Tensor:
        rounded_BE = watched.rounded(score_BE)
        index = in_best(rounded_BE, top_k)
        mask = torch.zeros_like(score_BE, dtype=torch.bool).scatter_(1, index, value=True)
        again = watched.mask(score_BE, rounded_BE, mask)
        changed = (again != mask).any(dim=1)
        index[changed] = again[changed].nonzero()[:, 1].view(-1, index.shape[1])
        return index

    monkeypatch.setattr(indexer, "top_k_mask", top_k_mask)
    monkeypatch.setattr(indexer, "top_k_numbers", top_k_numbers)
    monkeypatch.setattr(decode_keys, "best", best)
    return watched
