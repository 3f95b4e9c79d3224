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


def taught(share: float, *, warmup_steps: int = 0) -> Schedule:
    answers = {"mathematics": 4, "code": 5, "agent": 3}
    return Schedule(ROWS, EvenDeal(list(ROWS), 8), 0, answers, share, warmup_steps)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_share_of_each_domains_visits_goes_to_its_teachers_answers_after_the_first_steps(
    share: float, warmup_steps: int
) -> None:
    schedule = taught(share, warmup_steps=warmup_steps)
    for step in range(warmup_steps):
        assert all(visit.by_teacher for visit in schedule.visits(step))
    counts = {domain: [0, 0] for domain in ROWS}  # of the students', of the teachers'
    for step in range(warmup_steps, 50):
        for visit in schedule.visits(step):
            counts[visit.domain][visit.by_teacher] += 1
            own, others = counts[visit.domain]
            assert abs(others - share * (own + others)) < 1 + 1e-9


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_teachers_answers_take_no_prompt_out_of_the_students_walk(share: float) -> None:
    with_answers = [v for step in range(60) for v in taught(share, warmup_steps=2).visits(step)]
    for domain, num_rows in ROWS.items():
        own = [v for v in with_answers if v.domain == domain and not v.by_teacher]
        alone = [v for v in visits(range(60)) if v.domain == domain]
        assert own == alone[: len(own)]
        others = [v for v in with_answers if v.domain == domain and v.by_teacher]
        first_pass = [v.row for v in others if v.epoch == 0]
        assert sorted(first_pass) == list(range(taught(share).num_answers[domain]))
        assert len(others) + len(own) == len(alone)
        assert num_rows >= len({v.row for v in own})


def test_the_visits_of_a_domain_stand_together() -> None:
    domains = [visit.domain for visit in visits(range(3, 4))]
    assert domains == sorted(domains, key=list(ROWS).index)
