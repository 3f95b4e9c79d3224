"""What a step samples: a pure function of the step and of what was logged of earlier ones, so a
resume needs no state and no counter can drift away from another.

A deal says how many prompts each domain has had before a step. A domain's visits walk through its
rows in an order that is drawn afresh for every pass (epoch).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Visit:
    """One prompt of a step: `Visit("mathematics", row=17, epoch=2)`, for the third time."""

    domain: str
    row: int
    """Index among the domain's training rows."""

    epoch: int
    """Earlier visits of the same row: a fresh `sample` number for its rollout."""


class Deal(Protocol):
    """Shares the prompts of all steps out among the domains."""

    def before(self, step: int) -> Mapping[str, int]:
        """How many each domain has had before step 0, 1, ..."""
        ...


@dataclass(frozen=True)
class EvenDeal:
    """Like cards: prompt k of the run goes to domain k mod D."""

    domains: Sequence[str]
    prompts_per_step: int

    def before(self, step: int) -> Mapping[str, int]:
        """As in `Deal`."""
        dealt, num_domains = step * self.prompts_per_step, len(self.domains)
        return {
            domain: (dealt - place + num_domains - 1) // num_domains
            for place, domain in enumerate(self.domains)
        }


@dataclass(frozen=True)
class Schedule:
    """Which prompts each step samples."""

    num_rows: Mapping[str, int]
    """Training rows of each domain."""

    deal: Deal
    seed: int

    def visits(self, step: int) -> list[Visit]:
        """The visits of step 0, 1, ...; those of one domain stand together."""
        before, after = self.deal.before(step), self.deal.before(step + 1)
        return [
            self._visit(domain, number)
            for domain in self.num_rows
            for number in range(before[domain], after[domain])
        ]

    def _visit(self, domain: str, number: int) -> Visit:
        epoch, place = divmod(number, self.num_rows[domain])
        order = row_order(domain, self.num_rows[domain], epoch, self.seed)
        return Visit(domain, order[place], epoch)


@lru_cache(maxsize=64)
def row_order(domain: str, num_rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of a domain's rows for one pass over them."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{domain}/{epoch}").shuffle(order)
    return tuple(order)
