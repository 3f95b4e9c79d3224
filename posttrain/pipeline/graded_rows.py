"""Whether every row of a domain has what its rewards read. Imports no reward."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.domains import DomainSpec, Row, SourceConfig
from posttrain.errors import DataError
from posttrain.pipeline.recipe_domain import DomainConfig
from posttrain.pipeline.words import shown

ANSWER = (("answer",),)

NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "exact": ANSWER,
    "formats": (
        ("thinks", "language", "max_repetition", "min_words", "max_words", "max_thinking_words"),
    ),
    "instructions": (("instruction_id_list",), ("kwargs",)),
    "mathematics": ANSWER,
    "programs": (("tests",),),
    "puzzles": ANSWER,
    "tools": (("answer", "calls", "state", "solution"),),
    "verdicts": (("gold_verdict",),),
}
"""Of each reward of ours: of each group of fields a row, or `reward_options`, has one."""


def check_graded_rows(domain: DomainConfig, rows: Sequence[Row], folder: Path) -> None:
    """Raise DataError naming the source, the row and the field, if more rows than the domain's
    `bad_gold` lack what their rewards read. What a user's reward reads is not known."""
    lacking = [(place, names) for place, row in enumerate(rows) if (names := missing(domain, row))]
    if not lacking or domain.bad_gold == "all" or len(lacking) <= domain.bad_gold:
        return
    place, (reward, names) = lacking[0]
    row = rows[place]
    number = sum(other.source == row.source for other in rows[: place + 1])
    more = f", as {len(lacking) - 1} more rows do" if len(lacking) > 1 else ""
    raise DataError(
        f"{source_of(domain.data.parts[row.source], folder)}, row {number}, "
        f"{shown(row.messages[-1]['content'])}, lacks {' or '.join(names)}{more}, and reward "
        f"{reward!r} reads it (the row has {', '.join(row.fields) or 'no other field'}): add it, "
        "name the field that has it in data.columns, or take another reward"
    )


def missing(domain: DomainSpec, row: Row) -> tuple[str, tuple[str, ...]] | None:
    """The first reward that lacks something, and the fields of which it needs one."""
    fields = domain.reward_fields(row.fields)
    for reward in domain.graded_rewards:
        for names in NEEDED.get(reward, ()):
            if all(fields.get(name) in (None, "") for name in names):
                return reward, names
    return None


def source_of(data: SourceConfig, folder: Path) -> str:
    """The file, or what else rows come from."""
    file_name = data.jsonl or data.parquet
    return str(folder / file_name) if file_name else data.source
