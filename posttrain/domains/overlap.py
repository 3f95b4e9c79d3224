"""Training prompts that say nearly what a test's prompt says: found by the words they share.

    overlap(a, b) = |grams(a) & grams(b)| / min(|grams(a)|, |grams(b)|)

with the sets of runs of `num_words` words of the prompts' texts; a shorter text is one run. Case
and punctuation do not count, numbers do.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.domains.rows import Row

WORDS = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row to train on and the test's prompt that it is nearest to."""

    row: Row
    other: Row
    source: str
    """Whose prompt `other` is."""
    share: float


def grams(row: Row, num_words: int) -> set[tuple[str, ...]]:
    """Runs of `num_words` words of the row's prompt, what tools and system said included."""
    text = " ".join(str(message["content"]) for message in row.messages)
    words = WORDS.findall(text.casefold())
    if len(words) <= num_words:
        return {tuple(words)}
    return {tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)}


def overlaps(
    train: Iterable[Row], tests: Mapping[str, Sequence[Row]], *, num_words: int, above: float
) -> list[Overlap]:
    """The rows of `train` that overlap with a row of `tests` (by source) by more than `above`."""
    others = [(source, row) for source, rows in tests.items() for row in rows]
    sizes: list[int] = []
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, (_, row) in enumerate(others):
        found = grams(row, num_words)
        sizes.append(len(found))
        for gram in found:
            having[gram].append(number)
    result: list[Overlap] = []
    for row in train:
        mine = grams(row, num_words)
        shared = Counter(number for gram in mine for number in having.get(gram, ()))
        shares = {n: count / min(len(mine), sizes[n]) for n, count in shared.items()}
        best = max(shares, key=shares.__getitem__, default=None)
        if best is not None and shares[best] > above:
            source, other = others[best]
            result.append(Overlap(row, other, source, shares[best]))
    return result
