import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import RewardError
from rewards.mathematics import prepare, score
from rewards.verifier import NoVerdict, Verifier, shared

GOLD = ["85", "-3", "1,234", "0.5", "1/2", "\\frac{3}{4}", "5 cm", "Tuesday", "B", "x^2+2x+1"]
MORE_GOLD = [
    "(1, 2)",
    "[0,1)",
    "\\sqrt{8}",
    "\\{1,2\\}",
    "50\\%",
    "1 2 3",
    "\\text{even}",
    "2^{4000}",
]


@pytest.mark.parametrize("gold", [*GOLD, *MORE_GOLD, 85, -3, 0.5])
def test_the_gold_answer_scores_exactly_1(gold: object) -> None:
    assert score(str(gold), answer=gold).reward == 1.0
    assert score(f"\\boxed{{{gold}}}", answer=gold).reward == 1.0
    assert score(f"We find that the answer is ${gold}$.", answer=gold).reward == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("85.", "85"),
        ("\\boxed{50\\%}", "50\\%"),
        ("50%", "50\\%"),
        ("50", "50%"),
        ("\\boxed{10 m/s}", "10 m/s"),
        ("\\boxed{10}", "10 m/s"),
        ("\\boxed{7/2}", "3\\frac{1}{2}"),
        ("3 1/2", "7/2"),
        ("\\boxed{(B)}", "B"),
        ("\\boxed{(-\\infty, 3]}", "(-\\infty,3]"),
        ("\\boxed{2, 1}", "\\{1,2\\}"),
        ("\\boxed{[3,4]\\cup[1,2]}", "[1,2]\\cup[3,4]"),
        ("\\boxed{(3, \\pi/2)}", "(3,\\frac{\\pi}{2})"),
        ("the answer is 85.", "85"),
        ("Answer: 85", "85"),
        ("12 + 73 = 85", "85"),
        ("There are 85 apples in the basket.", "85"),
        ("not \\boxed{84} but \\boxed{x = 85}", "85"),
        ("\\boxed{85\\text{ cm}}", "85"),
        ("\\boxed{85^\\circ}", "85"),
        ("\\$1{,}234.50", "1234.5"),
        ("\u22123", "-3"),
        ("0.5", "1/2"),
        ("\\boxed{\\dfrac12}", "1/2"),
        ("2/4", "1/2"),
        ("the answer is tuesday", "Tuesday"),
        ("\\boxed{(x+1)^2}", "x^2+2x+1"),
        ("$2\\sqrt{2}$", "\\sqrt{8}"),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}"),
        ("y^2+x^2", "x^2+y^2"),
    ],
)
def test_the_same_answer_otherwise_written_scores_1(response: str, gold: str) -> None:
    assert score(response, answer=gold).reward == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("", "85"),
        (" ", "85"),
        ("84", "85"),
        ("855", "85"),
        ("85abc", "85"),
        ("85 foo", "85"),
        ("85 85", "85"),
        ("85%", "85"),
        ("-85", "85"),
        ("the answer is - 85", "85"),
        ("perhaps 85", "85"),  # no sentence
        ("12+73", "85"),
        ("\\boxed{12+73}", "85"),
        ("\\boxed{\\frac{170}{2}}", "85"),
        ("170/2", "85"),
        ("the answer is \\boxed{85", "85"),
        ("\\boxed{85} or rather \\boxed{86}", "85"),
        ("the answer is 1/2", "2"),
        ("1e6", "1000000"),
        ("nan", "85"),
        ("\\boxed{5 m}", "5 cm"),
        ("5 m", "5 cm"),
        ("123", "1 2 3"),
        ("Tuesdays", "Tuesday"),
        ("Monday Tuesday", "Tuesday"),
        ("b", "B"),
        ("(2, 1)", "(1, 2)"),
        ("\\boxed{\\{1,2\\}}", "(1, 2)"),
        ("\\boxed{(1, 2)}", "\\{1,2\\}"),
        ("\\boxed{(0,1)}", "[0,1)"),
        ("\\boxed{[0,1]}", "[0,1)"),
        ("\\boxed{(-\\infty,3)}", "(-\\infty,3]"),
        ("0.5", "50%"),
        ("\\boxed{50\\%}", "0.5"),
        ("\\boxed{10 km/h}", "10 m/s"),
        ("\\boxed{5 cm^3}", "5 cm^2"),
        ("\\boxed{3/2}", "3\\frac{1}{2}"),
        ("\\boxed{x^2, x^3}", "x^2"),
        ("\\boxed{\\{3, 4\\}}", "3"),
        ("\\boxed{1.414}", "\\sqrt{2}"),
        ("x^2", "x^2+2x+1"),
    ],
)
def test_another_answer_or_junk_after_it_scores_0(response: str, gold: str) -> None:
    assert score(response, answer=gold).reward == 0.0


HOSTILE = [
    "9" * 100_000,
    "(" * 100_000,
    "{" * 3_000,
    "$" * 10_000,
    " " * 100_000,
    "1," * 25_000,
    "-" * 100_000 + "85",
    "\x00\ud800",
    "\\boxed{" * 5_000,
    "\\boxed{" + "{" * 100_000,
    "9**9**9",
    "\\boxed{9^{9^{9}}}",
    "\\boxed{9^{9x^{9}}}",
    "\\boxed{((9!)!)!}",
    "\\boxed{\\binom{10000000}{5000000}}",
    "\\boxed{\\sum_{n=1}^{99999999} n^n}",
    "\\boxed{\\int_0^1 x^x dx}",
    "\\boxed{(x+y)^{5000}}",
    "\\boxed{((((x+1)^9+y)^9+z)^9+w)^9}",
    "\\boxed{" + "".join(f"(a+b+c+{n})" for n in range(30)) + "}",
    "\\boxed{\\{" + ",".join(map(str, range(90))) + "\\}}",
    "\\frac{1}{" * 60,
]


@pytest.mark.parametrize("gold", ["85", "x^2", "Tuesday"])
@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_zeros_in_bounded_time(response: str, gold: str) -> None:
    prepare([("", {"answer": gold})])
    start = time.monotonic()
    assert score(response, answer=gold).reward == 0.0
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize("gold", [None, "", "  ", ["85"], {"value": 85}])
def test_bad_gold_is_an_error(gold: object) -> None:
    with pytest.raises(RewardError, match="answer"):
        score("85", answer=gold)


def test_a_thread_that_is_not_the_main_one_may_grade() -> None:
    found: list[float] = []
    thread = threading.Thread(
        target=lambda: found.append(score("\\boxed{(x+1)^2}", answer="x^2+2x+1").reward)
    )
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    verifier = Verifier()
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    "found",
    [
        "9^{9^{9^{9}}}",
        "((9!)!)!",
        "(x+y+z)^{4000}",
        "\\binom{10000000}{5000000}",
        "\\sum_{n=1}^{99999999} n^n",
        "{" * 3_000,
        "\\{" + ",".join(f"x^{{{n}}}+{n}" for n in range(2_000)) + "\\}",
    ],
)
def test_a_question_without_end_is_ended_and_the_next_one_answered(
    verifier: Verifier, found: str
) -> None:
    start = time.monotonic()
    try:
        reason = str(verifier.equal("x^2+1", found))
    except NoVerdict as error:
        reason = str(error)
    assert reason == "False" or "takes longer" in reason or "needs more" in reason
    assert time.monotonic() - start < 8.0
    assert verifier.equal("(x+1)^2", "x^2+2x+1")


def test_a_verifier_whose_process_was_killed_starts_another(verifier: Verifier) -> None:
    assert verifier.equal("x", "x")
    process = verifier._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    with contextlib.suppress(NoVerdict):
        verifier.equal("x", "x")
    assert verifier.equal("x", "x")


def test_math_verify_is_ready_before_the_first_answer_that_needs_it() -> None:
    prepare([("", {"answer": "85"}), ("", {"answer": "x^2"})])
    assert shared()._process is not None


def test_sympy_stays_out_of_the_process_that_grades() -> None:
    source = (
        "import sys\nfrom rewards.mathematics import score\n"
        "assert score('$x+x$', answer='2x').reward == 1.0\nassert 'sympy' not in sys.modules"
    )
    home = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", source], env={**os.environ, "PYTHONPATH": str(home)}
    )
    assert done.returncode == 0
