"""Rows that say nearly what an earlier one says, by the words they share (overlap.py)."""

from collections import defaultdict
from collections.abc import Sequence

from posttrain.domains.overlap import Overlap, grams
from posttrain.domains.rows import Row

TRAIN = "train"

MAX_LED_TO = 50
"""A run of words leads to the first so many rows that have it: what every prompt of a data set says
would compare each with all. Exact where no run is in more rows."""


def near_duplicates(rows: Sequence[Row], *, num_words: int, above: float) -> list[Overlap]:
    """Each row that overlaps with an earlier one by more than `above`, and the nearest of those."""
    sets = [grams(row, num_words) for row in rows]
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    result: list[Overlap] = []
    for number, (row, mine) in enumerate(zip(rows, sets, strict=True)):
        earlier = sorted({other for gram in mine for other in having[gram]})
        shares = {n: len(mine & sets[n]) / min(len(mine), len(sets[n])) for n in earlier}
        best = max(shares, key=shares.__getitem__, default=None)
        if best is not None and shares[best] > above:
            result.append(Overlap(row, rows[best], TRAIN, shares[best]))
        for gram in mine:
            if len(having[gram]) < MAX_LED_TO:
                having[gram].append(number)
    return result
