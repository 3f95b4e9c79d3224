"""Programs that are run: function tests and stdin/stdout tests, at whatever level there is."""

import time
from functools import partial
from typing import Any

import pytest

from rewards import RewardError
from rewards.grader import GradeItem, Grader
from rewards.literals import NotALiteral, read, same
from rewards.programs import extract
from rewards.programs import score as score_at
from rewards.sandbox import Sandbox

score = partial(score_at, sandbox="limits")  # the best level this machine has
Tests = list[dict[str, Any]]

ADD: Tests = [{"call": f"add({a}, {b})", "expect": str(a + b)} for a, b in ((1, 2), (5, 5), (0, 0))]
SUM: Tests = [
    {"stdin": "1 2\n3\n", "stdout": "6\n"},
    {"stdin": "", "stdout": "0"},
    {"stdin": "-4", "stdout": "-4\n"},
]
READ_ALL = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"


@pytest.mark.parametrize(
    ("gold", "tests"),
    [
        ("def add(a, b):\n    return a + b", ADD),
        ("add = lambda a, b: a + b", ADD),
        ("```python\ndef add(a, b): return a + b\n```", ADD),
        ("First:\n```\nx = 1\n```\nthen\n ```py\ndef add(a, b): return a + b\n ```\nDone.", ADD),
        ("```python\ndef add(a, b):\n    return a + b\n", ADD),
        ("import operator\nadd = operator.add\nif __name__ == '__main__': add()", ADD),
        (READ_ALL, SUM),
        (f"if __name__ == '__main__':\n    {READ_ALL.splitlines()[0]}; print(sum(map(int, "
         "sys.stdin.read().split())), end='  \\n\\n')", SUM),
        (f"{READ_ALL}; sys.exit(1)", SUM),
    ],
)  # fmt: skip
def test_the_gold_answer_scores_exactly_1(gold: str, tests: Tests) -> None:
    found = score(gold, tests=tests)
    assert found.reward == 1.0, found.reason


@pytest.mark.parametrize(
    ("response", "tests", "reason"),
    [
        ("def add(a, b): return a * b", ADD, "gives '2', needed '3'"),
        ("def add(a): return a", ADD, "raises TypeError"),
        ("def plus(a, b): return a + b", ADD, "raises NameError"),
        ("def add(a, b) return a + b", ADD, "raises SyntaxError"),
        ("def add(a, b): return float(a + b)", ADD, "gives '3.0'"),
        ("def add(a, b):\n  while True: pass", ADD, "gives nothing (timeout)"),
        ("print(6)", SUM, "prints '6\\n', needed '0'"),
        ("print(' 6')", SUM, "prints"),
        ("while True: pass", SUM, "timeout"),
        (READ_ALL.replace("print", "str"), SUM, "prints ''"),
        ("print('x' * 10**6)", SUM, "output"),
    ],
)
def test_one_test_that_fails_is_a_zero_with_its_reason(
    response: str, tests: Tests, reason: str
) -> None:
    found = score(response, tests=tests, timeout_s=0.5)
    assert found.reward == 0.0
    assert reason in found.reason


def test_a_grader_says_once_at_which_level_its_programs_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "rewards.grader")
    item = GradeItem("add = lambda a, b: a + b", {"tests": ADD, "sandbox": "limits"})
    with Grader({"programs": 1.0}) as grader, Sandbox(lowest="limits") as sandbox:
        assert grader.facts == {}
        assert [grader.score([item])[0].reward for _ in range(2)] == [1.0, 1.0]
        assert grader.facts == {"sandbox": sandbox.level}
        assert caplog.messages == [f"reward programs: sandbox: {sandbox.level}"]


def test_the_time_is_for_all_tests_together() -> None:
    tests: Tests = [{"stdin": str(n), "stdout": str(n)} for n in range(50)]
    start = time.monotonic()
    slow = "import time; time.sleep(0.2); print(input())"
    for credit in (False, True):
        assert score(slow, tests=tests, timeout_s=0.6, partial=credit).reward < 0.2
    assert time.monotonic() - start < 5.0


def test_a_prelude_holds_what_the_response_may_leave_out() -> None:
    head = 'import math\ndef add(a, b):\n    """The sum."""'
    body, whole = "    return math.floor(a + b)\n", "def add(a, b): return math.floor(a + b)"
    for response in (body, whole, f"```\n{body}```"):
        assert score(response, tests=ADD, prelude=head).reward == 1.0
    assert score("", tests=ADD, prelude=head).reward == 0.0


def test_floats_may_differ_by_the_tolerance_only() -> None:
    tests: Tests = [{"call": f"f({x})", "expect": repr(x / 3)} for x in (1, 2, 4)]
    near = "def f(x): return x / 3 + 1e-9"
    assert score(near, tests=tests, tolerance=1e-6).reward == 1.0
    assert score(near, tests=tests).reward == 0.0
    assert score("def f(x): return x / 3 + 1e-5", tests=tests, tolerance=1e-6).reward == 0.0


LETTERS: Tests = [{"call": f"f({x!r})", "expect": repr(x)} for x in "aabcd"]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("def f(x): return x", 1.0),
        ("def f(x): return 'a'", 0.0),  # right twice, as a constant is
        ("def f(x): return 'b'", 0.0),
        ("def f(x): return x if x < 'c' else None", 1 / 3),  # (3 - 2) / (5 - 2)
        ("def f(x): return x if x != 'b' else 1 / 0", 2 / 3),
        ("import os\ndef f(x): return x if x < 'd' else os._exit(0)", 2 / 3),
        ("", 0.0),
    ],
)
def test_a_part_earns_what_is_beyond_a_constant_and_only_where_asked(
    response: str, reward: float
) -> None:
    found = score(response, tests=LETTERS, partial=True)
    assert found.reward == pytest.approx(reward, abs=1e-12)
    assert score(response, tests=LETTERS).reward == float(reward == 1.0)


def test_a_part_earns_nothing_over_two_answers() -> None:
    tests: Tests = [{"call": f"f({x})", "expect": str(x > 1)} for x in range(4)]
    assert score("def f(x): return x > 0", tests=tests, partial=True).reward == 0.0
    assert score("def f(x): return x > 1", tests=tests, partial=True).reward == 1.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([{"call": "f(1)", "expect": "1"}] * 3, "a constant passes"),
        ([{"stdin": "a", "stdout": "1"}, {"stdin": "b", "stdout": "1"}], "a constant passes"),
        ([*ADD, *SUM], "mix the kinds"),
        ([{"call": "f(", "expect": "1"}], "is no expression"),
        ([{"call": "x = 1", "expect": "1"}], "is no expression"),
        ([{"call": "f(1)", "expect": 1}], "is a literal as text"),
        ([{"call": "f(1)", "expect": "g(1)"}], "is a literal as text"),
        ([{"stdin": 1, "stdout": "1"}], "are texts"),
        ([{"call": "f(1)"}], "needs the keys"),
    ],
)
def test_bad_gold_is_an_error(tests: Tests, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score("", tests=tests)


def test_the_last_fenced_block_is_the_program() -> None:
    assert extract("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert extract("no fence: `x`") == "no fence: `x`"
    assert extract("```python\nx = '''\n```") == "x = '''\n"


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 2.5, -0.0, 1e300, float("inf"), True, None, "a'\n\ud55c", b"\x00", 1j, -2 + 3j),
        *([], (), {}, set[int](), frozenset({1}), (1,), [[1], (2.0, {"a": {3}})], {(1, 2): [None]}),
    ],
)
def test_every_literal_is_read_as_it_was_written(value: object) -> None:
    assert same(read(repr(value)), value)
    assert same(read(repr([value])), [value])


def test_values_of_other_types_are_other_values() -> None:
    values = [1, 1.0, True, "1", [1], (1,), {1}, {1: 1}, {1: True}, {True: 1}, None, b"1", [1.0]]
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            assert same(left, right) is (i == j), (left, right)
    assert same(float("nan"), float("nan"))
    assert same(read("OrderedDict({'a': deque([1])})"), {"a": [1]})
    assert same(read("defaultdict(<class 'int'>, {})".replace("<class 'int'>", "int")), {})


@pytest.mark.parametrize(
    "text",
    [
        *("", "f(1)", "x", "1 + 1", "[1", "__import__('os')", "{**{}}", "...", "{[]}", "-'a'"),
        *("(" * 300 + ")" * 300, "[" * 9999, "1" * 100_001, "-" * 50_000 + "1", "\x00", "set(1)"),
        *("lambda: 0", "[x for x in 'a']", "<object>", "1if 1 else 2", "f'{1}'", "dict(a=1)"),
    ],
)  # fmt: skip
def test_what_is_no_literal_is_refused_and_never_evaluated(text: str) -> None:
    with pytest.raises(NotALiteral):
        read(text)
