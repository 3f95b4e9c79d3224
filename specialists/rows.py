"""In which order rows are learned: drawn from several sources by weight, fixed by the seed alone.

The order is written down before training starts, so that it cannot depend on a trainer's sampler,
on epochs or on where a killed run went on.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from posttrain.domains.mixing import interleave


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row to learn: `TokenRow("4f1a", [0, 9, 5, 1], [False, False, True, True])`."""

    id: str
    """The content hash of its prompt."""
    tokens: list[int]
    is_learned: list[bool]
    """Whether each token carries loss."""

    source: int = 0
    """Which part of its domain's mixture it came from."""


def shuffled_forever(num_rows: int, *, seed: str) -> Iterator[int]:
    """0 ... num_rows - 1, all of them before any comes again, each time round in a fresh order."""
    rng = random.Random(seed)
    while True:
        order = list(range(num_rows))
        rng.shuffle(order)
        yield from order


def draw(
    sizes: Sequence[int], count: int, *, seed: int, weights: Sequence[float] | None = None
) -> list[tuple[int, int]]:
    """`count` pairs (source, row): sources by weight (null: equal), rows of each shuffled."""
    streams = [shuffled_forever(size, seed=f"{seed}/{i}") for i, size in enumerate(sizes)]
    order = islice(interleave(weights or [1.0] * len(sizes)), count)
    return [(source, next(streams[source])) for source in order]


def sort_within_steps(lengths: Sequence[int], rows_per_step: int) -> list[int]:
    """Positions 0 ... len(lengths) - 1, each step's sorted by length: its microbatches pad less."""
    steps = range(0, len(lengths), rows_per_step)
    return [
        position
        for start in steps
        for position in sorted(
            range(start, min(start + rows_per_step, len(lengths))), key=lambda p: lengths[p]
        )
    ]
