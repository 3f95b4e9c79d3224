from pathlib import Path

import pytest

from posttrain.domains import DataConfig, load_rows
from rewards import RewardError
from rewards.puzzles import best_constant, score


@pytest.mark.parametrize("gold", ["abc", "Two words", " padded ", 7, 2.5])
def test_the_gold_answer_scores_exactly_1(gold: object) -> None:
    assert score(str(gold), answer=gold).reward == 1.0


@pytest.mark.parametrize(
    ("response", "ignore_case", "reward"),
    [
        ("Two\n  words ", False, 1.0),
        ("two words", False, 0.0),
        ("two WORDS", True, 1.0),
        ("Two words!", True, 0.0),
        ("Two words Two words", False, 0.0),
        ("Twowords", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_only_whitespace_and_case_where_asked_are_forgiven(
    response: str, ignore_case: bool, reward: float
) -> None:
    assert score(response, answer="Two words", ignore_case=ignore_case).reward == reward


@pytest.mark.parametrize("gold", [None, "", " ", ["a"]])
def test_bad_gold_is_an_error(gold: object) -> None:
    with pytest.raises(RewardError, match="exact"):
        score("", answer=gold)


def test_behind_an_answer_tag_the_last_one_counts() -> None:
    for response, reward in (
        ("so it is <answer> 4  2 </answer>", 1.0),
        ("<answer>4 1</answer> no: <answer>4 2</answer>.", 1.0),
        ("<answer>4 2</answer> no: <answer>4 1</answer>", 0.0),
        ("<answer><answer>4 2</answer></answer>", 1.0),
        ("<answer>4 2", 0.0),
        ("4 2 <answer></answer>", 0.0),
        ("the answer is 4 2", 0.0),
    ):
        assert score(response, answer="4 2").reward == reward, response


def test_one_character_may_be_written_in_two_ways_and_two_may_not_be_one() -> None:
    assert score("cafe\u0301", answer="caf\u00e9").reward == 1.0
    assert score("x\u00b2", answer="x2").reward == 0.0


@pytest.mark.parametrize(
    "response", ["nan", "42 42", "42.0", "042", "'42'", "__import__('os')", ""]
)
def test_what_partial_credit_would_pay_for_earns_nothing(response: str) -> None:
    assert score(response, answer="42").reward == 0.0


def test_what_a_constant_earns_is_known() -> None:
    # "yes" three times of four
    assert best_constant(["yes", " yes", "no", "yes"]) == ("yes", 0.75)


def test_the_scorers_of_reasoning_gym_are_never_called() -> None:
    home = Path(__file__).resolve().parents[2]
    names = ("score_answer", "get_score_answer_fn")
    for package in ("rewards", "posttrain", "specialists", "distill"):
        for path in (home / package).rglob("*.py"):
            assert not any(name in path.read_text("utf-8") for name in names), path


@pytest.mark.parametrize("task", ["gcd", "letter_counting", "spell_backward", "number_filtering"])
def test_gold_of_reasoning_gym_scores_1_and_anothers_0(task: str) -> None:
    settings = {"task": task, "size": 20}
    rows = load_rows(DataConfig(reasoning_gym=settings), folder=Path(), seed=3)
    answers = [str(row.fields["answer"]) for row in rows]
    for answer, other in zip(answers, [*answers[1:], answers[0]], strict=True):
        assert score(answer, answer=answer).reward == 1.0
        assert score(other, answer=answer).reward == float(other == answer)
