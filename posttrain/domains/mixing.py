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


def check_parts(data: DataConfig, rows: Sequence[Row]) -> None:
    """Raise DataError unless each part of a mixture is among the rows that are trained on."""
    for number, part in enumerate(data.mixture or ()):
        if all(row.source != number for row in rows):
            raise DataError(
                f"part {number} of the mixture, {part.source}, has no row to train on: give it "
                "more, with responses where there is sft, or leave it out"
            )
