from itertools import islice

import pytest

from specialists.rows import draw, interleave, shuffled_forever, sort_within_steps


def test_every_row_comes_once_before_any_comes_twice() -> None:
    drawn = list(islice(shuffled_forever(5, seed="a"), 15))
    rounds = [drawn[i : i + 5] for i in range(0, 15, 5)]
    assert all(sorted(once) == [0, 1, 2, 3, 4] for once in rounds)
    assert len({tuple(once) for once in rounds}) > 1  # each in an order of its own


def test_sources_that_are_equally_far_behind_take_turns_from_the_first() -> None:
    assert list(islice(interleave([1.0, 1.0, 1.0]), 7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("weights", [[3.0, 1.0], [1.0, 1.0, 1.0], [0.2, 0.5, 2.7]])
def test_sources_get_their_shares_within_one_row(weights: list[float]) -> None:
    drawn = list(islice(interleave(weights), 1000))
    for count in (1, 7, 400, 1000):
        for source, weight in enumerate(weights):
            due = count * weight / sum(weights)
            assert abs(drawn[:count].count(source) - due) <= 1


def test_what_is_drawn_first_does_not_depend_on_how_much_is_drawn() -> None:
    assert draw([5, 9], 40, seed=1, weights=[1, 2])[:13] == draw([5, 9], 13, seed=1, weights=[1, 2])


def test_another_seed_draws_another_order() -> None:
    assert draw([50], 50, seed=1) != draw([50], 50, seed=2)


def test_rows_are_sorted_within_their_step_only() -> None:
    # steps of 3: lengths (3, 1, 2), (9, 8): positions 1, 2, 0, then 4, 3
    assert sort_within_steps([3, 1, 2, 9, 8], 3) == [1, 2, 0, 4, 3]
