"""Rows of several sources in turn, by weight."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from posttrain.domains.config import DataConfig
from posttrain.domains.rows import Row
from posttrain.errors import DataError


def interleave(weights: Sequence[float]) -> Iterator[int]:
    """Indices of sources, forever: each time the one that is furthest behind its share."""
    drawn = [0] * len(weights)
    while True:
        due = [weight / sum(weights) * (sum(drawn) + 1) for weight in weights]
        source = max(range(len(weights)), key=lambda s: (due[s] - drawn[s], -s))
        drawn[source] += 1
        yield source


def mixed(parts: Sequence[Iterator[Row]], weights: Sequence[float]) -> Iterator[Row]:
    """All rows, each with the number of its part. A part that ends leaves its turns to the others,
    among which the weights go on."""
    left = list(range(len(parts)))
    while left:
        for place in interleave([weights[part] for part in left]):
            row = next(parts[left[place]], None)
            if row is None:
                del left[place]
                break
            yield replace(row, source=left[place])


def check_parts(data: DataConfig, rows: Sequence[Row], read: Sequence[Row]) -> None:
    """Raise DataError unless each part of a mixture is among the rows that are trained on; `read`
    are all rows, also those that say what an earlier one says."""
    first: dict[str, int] = {}
    for row in read:
        first.setdefault(row.id, row.source)
    for number, part in enumerate(data.mixture or ()):
        if any(row.source == number for row in rows):
            continue
        is_repeated = all(first[row.id] != number for row in read if row.source == number)
        raise DataError(
            f"part {number} of the mixture, {part.source}, "
            + (
                "repeats prompts of the other parts and has none of its own: leave it out, or "
                "give it others"
                if is_repeated
                else "has no row to train on: give it more, with responses where there is sft, or "
                "leave it out"
            )
        )
