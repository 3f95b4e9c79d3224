"""What is wrong with a recipe's data, told without training: its graders, and how near its train
prompts are to those that it is tested on, and to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.domains import Overlap, load_rows, near_duplicates, near_tests, split
from posttrain.domains.config import DecontaminateConfig
from posttrain.pipeline.gold import GoldReport, check_gold
from posttrain.pipeline.recipe import DomainConfig
from posttrain.pipeline.recipe_file import RecipeFile
from posttrain.pipeline.words import shown

NUM_PAIRS = 3
"""Pairs of each domain that are told one by one."""

HEAD = ("domain", "train", "held out", "near a test's", "most", "near an earlier one")


@dataclass(frozen=True)
class OverlapFacts:
    """How many of a domain's train prompts are too near to a test's, by its `decontaminate` or,
    where that is null, by the defaults."""

    domain: str
    num_train: int
    num_heldout: int
    is_left_out: bool
    """Whether training leaves them out."""
    pairs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The nearest first."""
    duplicates: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Train prompts near an earlier one of them; they are all learned."""
    is_compared: bool = True
    """Streamed data is not: it is not read whole."""

    @property
    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        if not self.is_compared:
            return (self.domain, "streamed", "", "not compared", "", "")
        most = f"{self.pairs[0]['share']:.2f}" if self.pairs else ""
        what = "left out" if self.is_left_out else "learned: decontaminate is null"
        near = f"{len(self.pairs)}, {what}" if self.pairs else "0"
        sizes = (str(self.num_train), str(self.num_heldout))
        return (self.domain, *sizes, near, most, str(len(self.duplicates)))


@dataclass(frozen=True)
class DataReport:
    """Both findings; only what graders get wrong is a problem."""

    gold: GoldReport
    overlaps: list[OverlapFacts]

    def json(self) -> dict[str, Any]:
        """The same facts for machines."""
        return {"gold": self.gold.json(), "overlaps": [vars(facts) for facts in self.overlaps]}

    def text(self) -> str:
        """The same facts to read."""
        table = [HEAD, *(facts.row for facts in self.overlaps)]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        pairs = [
            f"  {facts.domain} {pair['share']:.2f}: {shown(pair['train'])} and, {pair['source']}, "
            f"{shown(pair['test'])}"
            for facts in self.overlaps
            for pair in (*facts.pairs[:NUM_PAIRS], *facts.duplicates[:NUM_PAIRS])
        ]
        return "\n".join([self.gold.text(), "", *lines, *pairs])

    def raise_problems(self) -> None:
        """Raise DataError where there are any."""
        self.gold.raise_problems()


def check_data(file: RecipeFile) -> DataReport:
    """Grade what is known to be right and wrong, and compare train prompts with the tests'.

    Raises:
        DataError, RecipeError: the rows cannot be read, or a reward cannot be loaded.
    """
    return DataReport(check_gold(file), check_overlaps(file))


def check_overlaps(file: RecipeFile) -> list[OverlapFacts]:
    """By domain, in the recipe's order."""
    share = max(domain.heldout_share for domain in file.recipe.domains.values())
    domains = file.recipe.domains.items()
    return [_facts(name, domain, file, untrained_share=share) for name, domain in domains]


def _facts(
    name: str, domain: DomainConfig, file: RecipeFile, *, untrained_share: float
) -> OverlapFacts:
    is_left_out = domain.decontaminate is not None
    if domain.data.streaming:
        return OverlapFacts(name, 0, 0, is_left_out, is_compared=False)
    folder, seed = file.folder, file.recipe.seed
    rows = load_rows(domain.data, folder=folder, seed=seed)
    train, heldout = split(rows, domain.heldout_share, untrained_share=untrained_share)
    config = domain.decontaminate or DecontaminateConfig()
    found = near_tests(config, train, heldout, folder=folder, seed=seed)
    twice = near_duplicates(train, num_words=config.num_words, above=config.max_overlap)
    sizes = (len(train), len(heldout))
    return OverlapFacts(name, *sizes, is_left_out, _nearest(found), _nearest(twice))


def _nearest(found: Sequence[Overlap]) -> list[dict[str, Any]]:
    return [near.json() for near in sorted(found, key=lambda near: (-near.share, near.row.id))]
