from typing import Any

import pytest

from rewards.score import RewardError
from rewards.verdicts import read_better, read_score, score, verdict_line


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Score: 1", 0.0),
        ("Score: 10", 1.0),
        ("Two of three.\nScore: 7", 6 / 9),
        ("Score: 5.5  \n\n", 0.5),
        ("Score: 2\nScore: 10", 1.0),  # the last counts
    ],
)
def test_a_score_is_its_place_on_the_scale(text: str, number: float) -> None:
    assert read_score(text, low=1, high=10) == pytest.approx(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Score:",
        "Score: ten",
        "Score: 11",  # off the scale
        "Score: 0",
        "Score: -3",
        "Score: 7/10",
        "Score: 7.",
        "score: 7",
        "Score: 1e1",
        "Score: ٧",  # a digit, but not of ours
        "Score: 7 or so",
        "I say Score: 7",
        "Score: 7\nbut I am not sure",
        "Score: 7\n\u2028Score: x",
        "Better: A",
        "Score: 9" + "9" * 400,
    ],
)
def test_what_is_no_score_is_read_as_none(text: str) -> None:
    assert read_score(text, low=1, high=10) is None


def test_a_preference_is_the_share_of_a() -> None:
    texts = ("Better: A", "why\nBetter: B", "Better: tie")
    assert [read_better(text) for text in texts] == [1.0, 0.0, 0.5]
    for text in ("Better: C", "Better: a", "Better: A or B", "A", "Score: 1", "Better: A\n."):
        assert read_better(text) is None


@pytest.mark.parametrize("gold", [1, 10, 7, 5.5, "A", "B", "tie"])
def test_the_gold_verdict_earns_one(gold: Any) -> None:
    for by_distance in (False, True):
        said = f"It says so.\n{verdict_line(gold)}"
        assert score(said, gold_verdict=gold, by_distance=by_distance).reward == 1.0


def test_another_verdict_earns_nothing_or_less_by_its_distance() -> None:
    assert score("Score: 7", gold_verdict=4).reward == 0.0
    # 3 of the 9 steps from 1 to 10
    assert score("Score: 7", gold_verdict=4, by_distance=True).reward == pytest.approx(1 - 3 / 9)
    assert score("Score: 3", gold_verdict=5, high=5, by_distance=True).reward == pytest.approx(0.5)
    assert score("Better: A", gold_verdict="B", by_distance=True).reward == 0.0
    assert score("Better: tie", gold_verdict="B", by_distance=True).reward == 0.5


@pytest.mark.parametrize("said", ["", "Score: x", "Better: A", "Score: 70", "I do not know."])
def test_what_cannot_be_read_earns_nothing(said: str) -> None:
    assert score(said, gold_verdict=7, by_distance=True).reward == 0.0


def test_a_score_is_no_answer_to_which_is_better() -> None:
    assert score("Score: 1", gold_verdict="A", by_distance=True).reward == 0.0


@pytest.mark.parametrize("gold", [None, "7", "C", 0, 11, True, float("nan"), [7]])
def test_gold_that_is_no_verdict_is_an_error(gold: Any) -> None:
    with pytest.raises(RewardError, match="gold_verdict"):
        score("Score: 7", gold_verdict=gold)


def test_a_scale_upside_down_is_an_error() -> None:
    with pytest.raises(RewardError, match="scale"):
        score("Score: 7", gold_verdict=7, low=10, high=1)
