"""Programs: what a model wrote is run in the sandbox on tests that the prompt does not show.

    score("def f(a, b): return a + b", tests=[{"call": "f(1, 2)", "expect": "3"}, ...])
    score("print(int(input()) * 2)", tests=[{"stdin": "4\\n", "stdout": "8\\n"}, ...])
    score("x[::-1]", tests=[{"x": "abc", "expect": "cba"}, ...])

A row's tests are of one kind. `call` is an expression in the program's names, `expect` the literal
that it must equal, types included. `stdin` is what the program reads, `stdout` what it must print,
up to white space at the ends of lines. `x` is for one-line expressions in that variable, which
`rewards.expressions` evaluates without running Python at all.

The program is the last fenced block of the response, or all of it, behind the row's `prelude`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.expression_library import TooLarge, size_of
from rewards.expressions import ExpressionError, evaluate, parse
from rewards.literals import NotALiteral, read, same
from rewards.sandbox import LEVELS, Level, Limits, Run, shared
from rewards.score import RewardError, Score, shown

KINDS = {"call": "expect", "stdin": "stdout", "x": "expect"}
"""What a test asks, and what it needs for an answer."""

MIN_DIFFERENT = 3
"""Different answers that a row's tests must have before a part of them earns anything."""

Tests = Sequence[Mapping[str, Any]]
Outcomes = list[str]
"""What is wrong with the answer to each test, in order; empty: nothing."""

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.I | re.M | re.S)
_OPEN_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n", re.I | re.M)


def score(
    response: str,
    *,
    tests: Tests | None = None,
    timeout_s: float = 2.0,
    prelude: str = "",
    tolerance: float = 0.0,
    partial: bool = False,
    memory_mb: int = 512,
    sandbox: Level = "namespaces",
    **_: object,
) -> Score:
    """1 if every test passes.

    Args:
        response: the model's.
        tests: of one of the kinds above.
        timeout_s: seconds for all tests together.
        prelude: put in front of the program: imports, helpers, or a function's head to complete.
        tolerance: by which floats may differ, absolutely or in proportion.
        partial: a share of the tests earns a share of the reward: (passed - c) / (n - c), where c
            tests have the most frequent answer, so that a constant earns nothing. Only over
            MIN_DIFFERENT different answers.
        memory_mb: address space of the program.
        sandbox: the lowest level that may run it.
    """
    kind = _kind(tests)
    assert tests is not None
    if kind == "x":
        outcomes = _expression(response, tests, stop_early=not partial)
    else:
        program = f"{prelude}\n{extract(response)}" if prelude else extract(response)
        limits = Limits(wall_s=timeout_s, memory_mb=memory_mb)
        if kind == "call":
            outcomes = _calls(program, tests, limits, sandbox, tolerance)
        else:
            outcomes = _dialogues(program, tests, limits, sandbox, stop_early=not partial)
    if partial:
        return _partial(outcomes, _answers(kind, tests))
    failed = next(filter(None, outcomes), "")
    return Score(0.0, failed) if failed else Score(1.0, f"all {len(tests)} tests pass")


def prepare(items: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Start the sandbox before the clock of the first program that needs it starts; the level that
    it reached."""
    found = {shared(level).level for level in sandbox_levels(items)}
    return {"sandbox": min(found, key=LEVELS.index)} if found else {}


def sandbox_levels(items: Sequence[tuple[str, Mapping[str, Any]]]) -> set[Level]:
    """The lowest levels that rows with tests to be run ask for; empty where there are none."""
    return {
        row.get("sandbox", "namespaces")
        for _, row in items
        if any("call" in test or "stdin" in test for test in row.get("tests") or ())
    }


def extract(response: str) -> str:
    """The program in a response."""
    blocks = _FENCE.findall(response)
    if blocks:
        return blocks[-1]
    opened = _OPEN_FENCE.search(response)  # cut off before its end
    return response[opened.end() :] if opened else response


def _calls(program: str, tests: Tests, limits: Limits, level: Level, tolerance: float) -> Outcomes:
    run = shared(level).run(program, calls=[test["call"] for test in tests], limits=limits)
    outcomes: Outcomes = []
    for number, test in enumerate(tests):
        where = f"test {number + 1} of {len(tests)}: {shown(test['call'])}"
        outcomes.append(_call_problem(run, number, test, where, tolerance))
    return outcomes


def _call_problem(
    run: Run, number: int, test: Mapping[str, Any], where: str, tolerance: float
) -> str:
    """What is wrong with the answer to a call; empty if nothing is."""
    if number >= len(run.results):
        why = run.results[-1].error if run.results and run.results[-1].error else run.end
        return f"{where} gives nothing ({why})"
    result = run.results[number]
    if result.error:
        return f"{where} raises {result.error}"
    needed = f"{where} gives {shown(result.text)}, needed {shown(test['expect'])}"
    try:
        found = read(result.text)
    except NotALiteral as error:
        return f"{needed} ({error})"
    return "" if same(found, _expected(test), tolerance=tolerance) else needed


def _dialogues(
    program: str, tests: Tests, limits: Limits, level: Level, *, stop_early: bool
) -> Outcomes:
    """Each test in a run of its own, as long as there is time."""
    left = limits.wall_s
    outcomes: Outcomes = []
    for number, test in enumerate(tests):
        where = f"test {number + 1} of {len(tests)}"
        problem = f"{where}: no time is left"
        if left > 0.01:
            own = Limits(wall_s=left, memory_mb=limits.memory_mb)
            run = shared(level).run(program, stdin=test["stdin"], limits=own)
            left -= run.seconds
            problem = "" if run.end == "ended" else f"{where}: {run.end}"
            if not problem and _lines(run.stdout) != _lines(test["stdout"]):
                problem = f"{where} prints {shown(run.stdout)}, needed {shown(test['stdout'])}"
        outcomes.append(problem)
        if problem and stop_early:
            break
    return outcomes


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _expression(response: str, tests: Tests, *, stop_early: bool) -> Outcomes:
    """The one-line expression on each `x`."""
    try:
        expression = parse(response.strip())
    except ExpressionError as error:
        return [f"no expression: {error}"]
    outcomes: Outcomes = []
    for number, test in enumerate(tests):
        problem = ""
        try:
            found = evaluate(expression, x=test["x"])
            if not same(found, test["expect"]):
                problem = f" gives {shown(found)}, needed {shown(test['expect'])}"
        except ExpressionError as error:
            problem = f": {error}"
        if problem:
            problem = f"test {number + 1} of {len(tests)}: x = {shown(test['x'])}{problem}"
        outcomes.append(problem)
        if problem and stop_early:
            break
    return outcomes


def _partial(outcomes: Outcomes, answers: Sequence[str]) -> Score:
    """`answers` has one for each test; what has no outcome has failed."""
    counts = Counter(answers)
    passed = outcomes.count("")
    reason = next(filter(None, outcomes), f"all {len(answers)} tests pass")
    if len(counts) < MIN_DIFFERENT:
        return Score(float(passed == len(answers)), reason)
    constant = max(counts.values())
    share = max(0, passed - constant) / (len(answers) - constant)
    return Score(share, f"{passed} of {len(answers)} tests pass; {reason}")


def _kind(tests: Tests | None) -> str:
    """The kind of a row's tests. RewardError where they cannot be used."""
    if not tests or isinstance(tests, str | Mapping):
        raise RewardError(
            "reward 'programs' needs a row's `tests` to be a list such as "
            f'[{{"call": "f(1, 2)", "expect": "3"}}], but it is {shown(tests)}'
        )
    kinds = {_kind_of(test) for test in tests}
    if len(kinds) > 1:
        raise RewardError(f"reward 'programs': a row's tests mix the kinds {', '.join(kinds)}")
    kind = kinds.pop()
    for test in tests:
        _CHECKS[kind](test)
    if kind != "x" and len(set(_answers(kind, tests))) < 2:
        raise RewardError(
            f"reward 'programs': all of a row's {len(tests)} tests have the same answer, so that a "
            "constant passes: add a test with another"
        )
    return kind


def _kind_of(test: object) -> str:
    if isinstance(test, Mapping):
        for kind, answer in KINDS.items():
            if kind in test and answer in test:
                return kind
    raise RewardError(
        "reward 'programs': a test needs the keys call and expect, stdin and stdout, or x and "
        f"expect, but one is {shown(test)}"
    )


def _answers(kind: str, tests: Tests) -> list[str]:
    if kind == "call":
        return [repr(_expected(test)) for test in tests]
    return [str(test[KINDS[kind]]) for test in tests]


def _check_x(test: Mapping[str, Any]) -> None:
    try:
        size_of(test["x"])
    except (TooLarge, TypeError) as error:
        raise RewardError(f"reward 'programs': the `x` of a test {error}") from error


def _check_call(test: Mapping[str, Any]) -> None:
    try:
        compile(test["call"], "<call>", "eval")
    except (SyntaxError, TypeError, ValueError) as error:
        raise RewardError(
            f"reward 'programs': the call {shown(test['call'])} is no expression: {error}"
        ) from error


def _check_dialogue(test: Mapping[str, Any]) -> None:
    if not isinstance(test["stdin"], str) or not isinstance(test["stdout"], str):
        raise RewardError(f"reward 'programs': stdin and stdout are texts, but one is {test!r}")


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "call": _check_call,
    "stdin": _check_dialogue,
    "x": _check_x,
}


def _expected(test: Mapping[str, Any]) -> object:
    """The value that `expect` writes."""
    try:
        return read(test["expect"])
    except (NotALiteral, AttributeError, TypeError) as error:
        raise RewardError(
            f"reward 'programs': `expect` is a literal as text, such as '[1, 2]' or \"'ab'\", but "
            f"one is {shown(test['expect'])}: {error}"
        ) from error
