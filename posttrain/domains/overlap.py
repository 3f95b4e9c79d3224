"""Training prompts that say nearly what a test's prompt says: found by the words they share.

    overlap(a, b) = |grams(a) & grams(b)| / min(|grams(a)|, |grams(b)|)

with the sets of runs of `num_words` words of the prompts' texts; a shorter text is one run. Case
and punctuation do not count, numbers do.

    overlaps/<domain>.json    beside a stage's outputs: what was left out of its training, and why
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.domains.config import DecontaminateConfig
from posttrain.domains.rows import Row
from posttrain.domains.sources import load_rows
from posttrain.files import write_atomic

WORDS = re.compile(r"\w+")

FOLDER = "overlaps"
HELD_OUT = "held out"
SHOWN = 160
"""Characters of a prompt that a report shows."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A row to train on and the test's prompt that it is nearest to."""

    row: Row
    other: Row
    source: str
    """Whose prompt `other` is."""
    share: float

    def json(self) -> dict[str, Any]:
        """The pair for a report, both texts cut."""
        return {
            "share": round(self.share, 4),
            "train": _shown(self.row),
            "train_id": self.row.id,
            "test": _shown(self.other),
            "test_id": self.other.id,
            "source": self.source,
        }


def near_tests(
    config: DecontaminateConfig,
    train: Sequence[Row],
    heldout: Sequence[Row],
    *,
    folder: Path,
    seed: int,
) -> list[Overlap]:
    """The rows of `train` that are too near to a held-out one or to one of `config.against`."""
    tests = {HELD_OUT: heldout} | {
        name: load_rows(data, folder=folder, seed=seed) for name, data in config.against.items()
    }
    return overlaps(train, tests, num_words=config.num_words, above=config.max_overlap)


def tell(
    found: Sequence[Overlap], out: Path, *, domain: str, num_train: int, config: DecontaminateConfig
) -> None:
    """Write into `out` which of a domain's `num_train` rows are left out, the nearest first."""
    pairs = sorted(found, key=lambda overlap: (-overlap.share, overlap.row.id))
    content = {
        "domain": domain,
        "num_words": config.num_words,
        "max_overlap": config.max_overlap,
        "num_train": num_train,
        "num_left_out": len(pairs),
        "pairs": [overlap.json() for overlap in pairs],
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomic(out / FOLDER / f"{domain}.json", text + "\n")


def told(out: Path) -> dict[str, dict[str, Any]]:
    """What `tell` wrote into a stage's folder, by domain."""
    files = sorted((out / FOLDER).glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    return {content["domain"]: content for content in found}


def counts(out: Path) -> dict[str, float]:
    """`contaminated/<domain>`: how many rows each domain's training left out."""
    return {
        f"contaminated/{name}": float(found["num_left_out"]) for name, found in told(out).items()
    }


def _shown(row: Row) -> str:
    text = str(row.messages[-1]["content"])
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


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
