"""More prompts for the domains whose teachers are further away.

    gap_d    = smoothing gap_d + (1 - smoothing) (d's logged gap), step after step
    share_d  = min(max(scale gap_d, floor / D), ceiling / D),  scale such that the shares sum to 1

A logged gap is the KL, or how far the student's score is below the teacher's in the steps that have
scores. It rests on logged numbers alone, so that a resumed run deals as a straight one. What a
domain weighs in the loss is another matter (balance.py).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Gaps = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""What a step's record says of the domains' gaps."""

LEAST = 1e-6
"""A gap is at least so much of the largest: shares can then grow to sum to 1."""


class GapDeal:
    """A deal of prompts (schedule.py) by smoothed gaps."""

    def __init__(
        self,
        domains: Sequence[str],
        prompts_per_step: int,
        history: Sequence[Mapping[str, Any]],
        *,
        gaps: Gaps,
        lag: int,
        floor: float,
        ceiling: float,
        smoothing: float,
    ) -> None:
        """`history` has the records of the steps that are learned, and grows; step s is dealt by
        the `gaps` of the steps before s - `lag`, which are learned by then."""
        self._gaps_of = gaps
        self._domains, self._prompts_per_step = list(domains), prompts_per_step
        self._history, self._lag, self._smoothing = history, lag, smoothing
        self._bounds = {"floor": floor, "ceiling": ceiling}
        self._gaps: dict[str, float] = {}
        self._num_read = 0
        self._credit = dict.fromkeys(domains, 0.0)
        self._before = [dict.fromkeys(domains, 0)]

    def before(self, step: int) -> Mapping[str, int]:
        """How many prompts each domain has had before step 0, 1, ..."""
        while len(self._before) <= step:
            self._deal(len(self._before) - 1)
        return self._before[step]

    def _deal(self, step: int) -> None:
        """One prompt after another goes to the domain that is furthest behind its share."""
        num_known = max(step - self._lag, 0)
        assert num_known <= len(self._history), "a step is dealt before those it rests on"
        for record in self._history[self._num_read : num_known]:
            self._gaps = smoothed(self._gaps, self._gaps_of(record), self._smoothing)
        self._num_read = num_known
        shares = bounded_shares(completed(self._gaps, self._domains), **self._bounds)
        counts = dict(self._before[-1])
        for _ in range(self._prompts_per_step):
            for domain, share in shares.items():
                self._credit[domain] += share
            behind = max(self._domains, key=self._credit.__getitem__)
            self._credit[behind] -= 1
            counts[behind] += 1
        self._before.append(counts)


def kl_gaps(record: Mapping[str, Any], *, domains: Sequence[str]) -> dict[str, float]:
    """Each domain's KL to its teachers, where the step has one."""
    return {d: record[f"kl/{d}"] for d in domains if record.get(f"kl/{d}") is not None}


def score_gaps(record: Mapping[str, Any], *, targets: Mapping[str, float]) -> dict[str, float]:
    """How far each domain's score is below its teachers', where the step has scores."""
    return {
        d: target - record[f"score/{d}"]
        for d, target in targets.items()
        if record.get(f"score/{d}") is not None
    }


def smoothed(
    gaps: Mapping[str, float], new: Mapping[str, float], smoothing: float
) -> dict[str, float]:
    """The gaps after one more step; a domain without a finite one in it keeps its own."""
    found = dict(gaps)
    for domain, gap in new.items():
        if math.isfinite(gap):
            gap = max(gap, 0.0)  # a KL is below it by rounding, a score where it is ahead
            found[domain] = smoothing * gaps.get(domain, gap) + (1 - smoothing) * gap
    return found


def completed(gaps: Mapping[str, float], domains: Sequence[str]) -> dict[str, float]:
    """A gap for each domain: the others' mean where nothing is known."""
    mean = sum(gaps.values()) / len(gaps) if gaps else 1.0
    return {domain: gaps.get(domain, mean) for domain in domains}


def bounded_shares(gaps: Mapping[str, float], *, floor: float, ceiling: float) -> dict[str, float]:
    """In proportion to the gaps, each between `floor` and `ceiling` times the even share."""
    low, high = floor / len(gaps), ceiling / len(gaps)
    largest = max(gaps.values())
    if largest <= 0:
        return dict.fromkeys(gaps, 1 / len(gaps))
    heights = {domain: max(gap / largest, LEAST) for domain, gap in gaps.items()}

    def at(scale: float) -> dict[str, float]:
        return {domain: min(max(scale * x, low), high) for domain, x in heights.items()}

    below, above = 0.0, high / LEAST  # all at the floor; all at the ceiling
    for _ in range(100):
        middle = (below + above) / 2
        if sum(at(middle).values()) < 1:
            below = middle
        else:
            above = middle
    return at(above)
