"""What a step samples: a pure function of the step and of what was logged of earlier ones, so a
resume needs no state and no counter can drift away from another.

A deal says how many visits each domain has had before a step. Those of the first steps, and after
them a share, evenly spread, go to an answer of the domain's teachers, the others to a prompt that
the student answers. Either kind walks through what there is in an order that is drawn afresh for
every pass (epoch).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Visit:
    """One row of a step: `Visit("mathematics", row=17, epoch=2)`, for the third time."""

    domain: str
    row: int
    """Index among the domain's training rows, or among its teachers' answers."""

    epoch: int
    """Earlier visits of the same row: a fresh `sample` number for its rollout."""

    by_teacher: bool = False
    """Whether a teacher has answered, or the student is to."""


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
    """Which prompts each step samples, and which of the teachers' answers it learns."""

    num_rows: Mapping[str, int]
    """Training rows of each domain."""

    deal: Deal
    seed: int
    num_answers: Mapping[str, int] = field(default_factory=dict[str, int])
    """Teachers' answers of each domain."""

    teacher_share: float = 0.0
    """Of the visits after the first steps."""

    warmup_steps: int = 0
    """First steps, all of whose visits go to teachers' answers."""

    def visits(self, step: int) -> list[Visit]:
        """The visits of step 0, 1, ...; those of one domain stand together."""
        before, after = self.deal.before(step), self.deal.before(step + 1)
        warm = after if step < self.warmup_steps else self.deal.before(self.warmup_steps)
        return [
            self._visit(domain, number, warm[domain])
            for domain in self.num_rows
            for number in range(before[domain], after[domain])
        ]

    def _visit(self, domain: str, number: int, num_warm: int) -> Visit:
        """Visit `number` of a domain, whose first `num_warm` are all of them its teachers'."""
        num_taught = self._num_taught(number, num_warm)
        by_teacher = self._num_taught(number + 1, num_warm) > num_taught
        of_kind = num_taught if by_teacher else number - num_taught
        num_rows = (self.num_answers if by_teacher else self.num_rows)[domain]
        epoch, place = divmod(of_kind, num_rows)
        order = row_order(domain, num_rows, epoch, self.seed)
        return Visit(domain, order[place], epoch, by_teacher)

    def _num_taught(self, number: int, num_warm: int) -> int:
        """How many of a domain's first visits go to its teachers' answers."""
        return min(number, num_warm) + math.floor(max(number - num_warm, 0) * self.teacher_share)


@lru_cache(maxsize=64)
def row_order(domain: str, num_rows: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of a domain's rows for one pass over them."""
    order = list(range(num_rows))
    random.Random(f"{seed}/{domain}/{epoch}").shuffle(order)
    return tuple(order)
