"""The schedule's laws: even, complete, fresh, and a function of the step alone."""

from collections import Counter

import pytest

from distill.schedule import EvenDeal, Schedule, Visit

ROWS = {"mathematics": 7, "code": 5, "agent": 11}


def visits(steps: range, *, prompts_per_step: int = 8, seed: int = 0) -> list[Visit]:
    schedule = Schedule(ROWS, EvenDeal(list(ROWS), prompts_per_step), seed)
    return [visit for step in steps for visit in schedule.visits(step)]


@pytest.mark.parametrize("prompts_per_step", [1, 3, 8])
def test_domains_get_the_same_number_of_prompts_give_or_take_one(prompts_per_step: int) -> None:
    for num_steps in range(1, 12):
        counts = Counter(
            v.domain for v in visits(range(num_steps), prompts_per_step=prompts_per_step)
        )
        given = [counts[domain] for domain in ROWS]
        assert sum(given) == num_steps * prompts_per_step
        assert max(given) - min(given) <= 1


def test_every_pass_visits_each_row_once_in_an_order_of_its_own() -> None:
    by_pass: dict[tuple[str, int], list[int]] = {}
    for visit in visits(range(100)):
        by_pass.setdefault((visit.domain, visit.epoch), []).append(visit.row)
    for (domain, epoch), rows in by_pass.items():
        assert len(set(rows)) == len(rows)
        if (domain, epoch + 1) in by_pass:
            assert sorted(rows) == list(range(ROWS[domain]))
    assert by_pass["agent", 0] != by_pass["agent", 1]


def test_no_visit_repeats_so_each_rollout_has_its_own_seed() -> None:
    seen = visits(range(100))
    assert len(set(seen)) == len(seen)


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    assert visits(range(17, 18)) == visits(range(18))[-8:]
    assert visits(range(4), seed=1) != visits(range(4), seed=0)


def test_the_visits_of_a_domain_stand_together() -> None:
    domains = [visit.domain for visit in visits(range(3, 4))]
    assert domains == sorted(domains, key=list(ROWS).index)
