import time
from typing import Any

import pytest

from rewards import RewardError
from rewards.expressions import ExpressionError, evaluate, parse
from rewards.programs import score

Tests = list[dict[str, Any]]
REVERSE: Tests = [{"x": word, "expect": word[::-1]} for word in ("abc", "Hello you", "")]
WORDS: Tests = [
    {"x": "b a", "expect": ["a", "b"]},
    {"x": "", "expect": []},
    {"x": "q", "expect": ["q"]},
]
VOWELS: Tests = [{"x": "hello", "expect": 2}, {"x": "xyz", "expect": 0}, {"x": "aaa", "expect": 3}]


@pytest.mark.parametrize(
    ("gold", "tests"),
    [
        ("x[::-1]", REVERSE),
        ("''.join(reversed(x))", REVERSE),
        ("sorted(x.split())", WORDS),
        ("sum(1 for c in x if c in 'aeiou')", VOWELS),
        (" len([c for c in x if c in 'aeiou'])\n", VOWELS),
    ],
)
def test_the_gold_answer_scores_exactly_1(gold: str, tests: Tests) -> None:
    assert score(gold, tests=tests).reward == 1.0


@pytest.mark.parametrize(
    ("source", "x", "value"),
    [
        ("x.upper() + x.lower().capitalize()", "ab", "ABAb"),
        ("x.replace('a', 'b').strip('b') or 'none'", "aba", "none"),
        ("x[1:-1] if len(x) > 2 else x[0]", "abc", "b"),
        ("'-'.join(x.title().split())", "ab cd", "Ab-Cd"),
        ("max(x) + min(x, key=ord)", "bca", "ca"),
        ("sorted(x.split(), key=len, reverse=True)[0]", "a bbb cc", "bbb"),
        ("[i * c for i, c in enumerate(x)]", "abc", ["", "b", "cc"]),
        ("[a + b for a in x for b in x if a != b]", "ab", ["ab", "ba"]),
        ("[a + b for a, b in zip(x, x[1:])]", "abc", ["ab", "bc"]),
        ("str(int(x) ** 2 % 7) + chr(ord('a') + 1)", "5", "4b"),
        ("1 < len(x) <= 3 and not x.isupper()", "abc", True),
        ("(x, -abs(-2), 7 // 2, 7 / 2, None)", "a", ("a", -2, 3, 3.5, None)),
        ("sum(list(range(1, 4)))", "", 6),
        ("x.count('a') in [1, 2]", "banana", False),
        ("sum(x) - x[0]", [1, 2, 3], 5),
    ],
)
def test_allowed_expressions_mean_what_python_means(source: str, x: object, value: object) -> None:
    assert evaluate(parse(source), x=x) == value


@pytest.mark.parametrize(
    ("response", "reward"),
    # REVERSE has three answers, so a constant passes one: (passed - 1) / (3 - 1)
    [("x[::-1]", 1.0), ("x[::-1][:3]", 0.5), ("'cba'", 0.0), ("x[", 0.0), ("x[-1] and 'cba'", 0.0)],
)
def test_a_part_of_the_tests_earns_what_is_beyond_a_constant(response: str, reward: float) -> None:
    assert score(response, tests=REVERSE, partial=True).reward == reward


@pytest.mark.parametrize("response", ["x", "x.upper()", "'cba'", "", "reverse x", "x[::-1]; x"])
def test_anything_but_all_tests_passed_scores_0(response: str) -> None:
    assert score(response, tests=REVERSE).reward == 0.0


@pytest.mark.parametrize(
    ("response", "expect"), [("len(x) == 1", 1), ("1", True), ("2.0", 2), ("(1, 2)", [1, 2])]
)
def test_a_value_of_another_type_is_another_value(response: str, expect: object) -> None:
    assert score(response, tests=[{"x": "a", "expect": expect}]).reward == 0.0


@pytest.mark.parametrize(
    "source",
    [
        "().__class__.__bases__[0].__subclasses__()",
        "x.__class__",
        "x.format(x)",
        "'%s' % x",
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "eval(x)",
        "getattr(x, 'upper')",
        "(lambda: x)()",
        "(y := x)",
        "f'{x}'",
        "{x: 1}",
        "{x}",
        "b'x'",
        "1j",
        "...",
        "sorted(x, key=print)",
        "x.split(sep=' ')",
        "[*x]",
        "len",
        "upper(x)",
        "[0 for x.y in x]",
        "await x",
        "x is None",
        "x @ x",
        "1 << 9",
    ],
)
def test_nothing_outside_the_whitelist_is_evaluated(source: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(parse(source), x="abc")


@pytest.mark.parametrize(
    "source",
    [
        "9**9**9",
        "9**-9**9",
        "'a'*10**9",
        "10**9*[x]",
        "[[[x]*9999]*9999]*9999",
        "x.replace('', 'a'*9999)",
        "x.ljust(10**9)",
        "x.zfill(10**30)",
        "('a'*9999).join('b'*9999)",
        "range(10**9)",
        "range(10**30)",
        "sum([a for a in range(9999) for b in range(9999)])",
        "[a for a in range(9999) for b in range(9) for c in 'ab']",
        "[i for i in range(9999) if str(i)*99 in x]",
        "round(5, -10**9)",
        "int('9'*9999)",
        "str([x]*9999)*9",
        "[" * 200,
        "(" * 400,
        "-" * 499 + "1",
        "x" + "+x" * 249,
        "x" + ".upper()" * 60,
        "x" * 100_000,
        "x\x00",
        "'\\N{' ",
        "\ud800",
        "x\nx",
    ],
)
def test_bombs_end_quickly_with_a_reason(source: str) -> None:
    start = time.monotonic()
    found = score(source, tests=REVERSE)
    assert found.reward == 0.0
    assert found.reason
    assert time.monotonic() - start < 2.0


@pytest.mark.parametrize(
    "tests", [None, [], "abc", {"x": "a"}, [{"x": "a"}], ["a"], [{"x": {"a": 1}, "expect": 1}]]
)
def test_bad_gold_is_an_error(tests: Any) -> None:
    with pytest.raises(RewardError, match="programs"):
        score("x", tests=tests)
