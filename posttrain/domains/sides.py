"""A domain's rows to train on and those held out, of data that is read whole or streamed.

Streamed data is read from its beginning until both sides have what a stage needs: no other row is
held, and what lies behind is not read. The position that a stage goes on from is therefore its
need, which its config says; and a prompt is on the side that it is on where all rows are read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posttrain.domains.config import DataConfig, DomainSpec
from posttrain.domains.rows import Row, is_heldout, split
from posttrain.domains.sources import load_rows, stream_rows

ROWS_TO_CHECK = 1000
"""So many rows of streamed data are looked at before a run."""


@dataclass(frozen=True, slots=True)
class Need:
    """How many different rows a stage takes of each side, at most: `Need(num_train=640)`."""

    num_train: int = 0
    num_heldout: int = 0
    is_answered: bool = False
    """Of the rows to train on those with a response count."""


def rows_to_check(data: DataConfig, *, folder: Path, seed: int) -> list[Row]:
    """All rows, or the first ones of streamed data."""
    most = ROWS_TO_CHECK if data.streaming else None
    return load_rows(data, folder=folder, seed=seed, most=most)


def load_sides(
    spec: DomainSpec, *, folder: Path, seed: int, need: Need | None
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those held out; of streamed data what is needed (None: all)."""
    share, untrained = spec.heldout_share, spec.untrained_share
    if not spec.data.streaming or need is None:
        rows = load_rows(spec.data, folder=folder, seed=seed)
        return split(rows, share, untrained_share=untrained)
    rows = stream_rows(spec.data, folder=folder, seed=seed)
    return take(rows, need, heldout_share=share, untrained_share=untrained)


def take(
    rows: Iterable[Row], need: Need, *, heldout_share: float, untrained_share: float = 0.0
) -> tuple[list[Row], list[Row]]:
    """As `split`, of the first rows that fill both sides; reads no row more than that takes."""
    train, heldout = dict[str, Row](), dict[str, Row]()
    unread = iter(rows)
    while len(train) < need.num_train or len(heldout) < need.num_heldout:
        row = next(unread, None)
        if row is None:
            break
        if is_heldout(row.messages, heldout_share):
            side, most = heldout, need.num_heldout
        elif is_heldout(row.messages, untrained_share) or (need.is_answered and not row.response):
            continue
        else:
            side, most = train, need.num_train
        if len(side) < most:
            side.setdefault(row.id, row)
    return list(train.values()), list(heldout.values())
