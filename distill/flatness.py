"""Whether distillation has nothing left to gain: every domain's KL has flattened.

Through a domain's KLs of the last n steps goes the least-squares line a + b t. By |b| n / mean(KL)
of itself the KL still moves over so many steps, up or down.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

STOPPED = "stopped"
"""In the record of the last step, where a run ended for its flatness."""


def relative_slope(points: Sequence[tuple[float, float]], num_steps: int) -> float:
    """|b| num_steps / mean(y) of (t, y), two points at least; 0 where y is 0 throughout."""
    mean_t = sum(t for t, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((t - mean_t) * (y - mean_y) for t, y in points)
    slope /= sum((t - mean_t) ** 2 for t, _ in points)
    return abs(slope) * num_steps / mean_y if mean_y > 0 else 0.0


def steepest(
    history: Sequence[Mapping[str, Any]], domains: Sequence[str], window: int
) -> float | None:
    """The largest relative slope of a domain's KL in the records of the last `window` steps.

    None where it cannot be told: there are fewer steps, or a domain has a KL in fewer than half of
    them. A domain that has none, which rests, counts for nothing, unless all of them do.
    """
    if len(history) < window:
        return None
    slopes: list[float] = []
    for domain in domains:
        values = [record.get(f"kl/{domain}") for record in history[-window:]]
        points = [(float(t), y) for t, y in enumerate(values) if y is not None and math.isfinite(y)]
        if not points:
            continue
        if len(points) < max(window / 2, 2):
            return None
        slopes.append(relative_slope(points, window))
    return max(slopes, default=None)


def is_stopped(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last of these steps ended the run."""
    return bool(history) and STOPPED in history[-1]


def describe_flatness(
    history: Sequence[Mapping[str, Any]],
    domains: Sequence[str],
    *,
    window: int,
    max_slope: float | None,
) -> dict[str, float]:
    """`kl_slope`, of the domain whose KL still moves most, and `stopped` where that is at most
    `max_slope`. Nothing where `max_slope` is None or the slope cannot be told."""
    slope = None if max_slope is None else steepest(history, domains, window)
    if slope is None or max_slope is None:
        return {}
    return {"kl_slope": slope, **({STOPPED: 1} if slope <= max_slope else {})}
