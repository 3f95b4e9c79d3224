"""Simulated environments: what their tools do, and what hostile arguments do to them."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from rewards import RewardError
from rewards.environments import KINDS, MAX_CALLS, Replay, replay, tools_of
from rewards.schemas import invalid

Calls = list[tuple[str, dict[str, Any]]]


def run(kind: str, start: object, calls: Sequence[tuple[str, Any]]) -> Replay:
    made = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return replay({"kind": kind, "start": start}, made)


def test_a_calculator_by_hand() -> None:
    calls: Calls = [
        ("calculate", {"expression": "(2 + 3) * rate"}),
        ("store", {"name": "tax", "expression": "ans / 4"}),
        ("calculate", {"expression": "ans + tax"}),
        ("calculate", {"expression": "nothing + 1"}),
    ]
    found = run("calculator", {"rate": 8}, calls)
    assert found.results[:3] == ["40", "10.0", "50.0"]
    assert found.results[3].startswith("error: the name 'nothing'")
    assert found.state == {"ans": 50.0, "rate": 8, "tax": 10.0}
    assert run("calculator", {"rate": 8}, [("clear", {})]).state == {"ans": 0}


def test_a_store_by_hand() -> None:
    calls: Calls = [
        ("set", {"key": "city", "value": "Oslo"}),
        ("set", {"key": "cat", "value": "Mia"}),
        ("keys", {"prefix": "c"}),
        ("delete", {"key": "a"}),
        ("get", {"key": "a"}),
        ("get", {"key": "city"}),
        ("keys", {}),
    ]
    found = run("store", {"a": "1"}, calls)
    needed = ["set", "set", "cat\ncity", "deleted", "error: no key 'a'", "Oslo", "cat\ncity"]
    assert found.results == needed
    assert found.state == {"city": "Oslo", "cat": "Mia"}


def test_files_by_hand() -> None:
    calls: Calls = [
        ("write_file", {"path": "/notes/./b.txt", "content": "one"}),
        ("append_file", {"path": "notes/x/../b.txt", "content": "!"}),
        ("list_files", {"folder": "notes"}),
        ("move_file", {"path": "notes/a.txt", "to": "old/a.txt"}),
        ("read_file", {"path": "old/a.txt"}),
        ("read_file", {"path": "notes/a.txt"}),
        ("write_file", {"path": "old", "content": ""}),
        ("write_file", {"path": "old/a.txt/b", "content": ""}),
        ("delete_file", {"path": "old/a.txt"}),
        ("list_files", {}),
    ]
    found = run("files", {"notes/a.txt": "hello"}, calls)
    assert found.results == [
        *("written", "written", "notes/a.txt\nnotes/b.txt", "moved", "hello"),
        *("error: no file notes/a.txt", "error: old is a folder"),
        *("error: old/a.txt/b is within a file", "deleted", "notes/b.txt"),
    ]
    assert found.state == {"notes/b.txt": "one!"}


SCRIPT = "CREATE TABLE t (name TEXT, n INT); INSERT INTO t VALUES ('b', 2), ('a', 1);"


def test_a_database_by_hand() -> None:
    calls: Calls = [
        ("sql", {"statement": "SELECT name, n * 2 FROM t ORDER BY n"}),
        ("sql", {"statement": "UPDATE t SET n = 5 WHERE name = 'a'"}),
        ("sql", {"statement": "SELECT missing FROM t"}),
        ("sql", {"statement": "BEGIN"}),
        ("sql", {"statement": "DELETE FROM t"}),
        ("sql", {"statement": "ROLLBACK"}),
        ("sql", {"statement": "INSERT INTO t VALUES (x'00ff', NULL)"}),
    ]
    found = run("database", SCRIPT, calls)
    assert found.results[:2] == ['["name", "n * 2"]\n["a", 2]\n["b", 4]', "done"]
    assert found.results[2] == "error: no such column: missing"
    assert found.results[3:] == ["done"] * 4
    rows = [["00ff", None], ["a", 5], ["b", 2]]
    assert found.state == {"t": {"columns": ["name", "n"], "rows": rows}}


def test_the_order_of_rows_is_no_part_of_a_databases_state() -> None:
    other = SCRIPT.replace("('b', 2), ('a', 1)", "('a', 1), ('b', 2)")
    assert run("database", other, []).state == run("database", SCRIPT, []).state


HOSTILE_SQL = [
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x || x FROM c) SELECT max(x) FROM c",
    "WITH RECURSIVE c(x) AS (SELECT zeroblob(19000) UNION ALL SELECT x FROM c) "
    "SELECT x FROM c ORDER BY x",
    "SELECT * FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n, t o, "
    "t p, t q, t r, t s, t u, t v, t w ORDER BY 1",
    "INSERT INTO t WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    "SELECT hex(zeroblob(20000)), x FROM c",
    "SELECT zeroblob(1000000000)",
    "SELECT replace(hex(zeroblob(40000)), '0', hex(zeroblob(40000)))",
    "SELECT hex(randomblob(10))",
    "SELECT abs(random())",
    "SELECT load_extension('/tmp/x.so')",
    "ATTACH DATABASE '/tmp/posttrain-attached.db' AS other",
    "VACUUM INTO '/tmp/posttrain-vacuum.db'",
    "PRAGMA hard_heap_limit = 0",
    "PRAGMA writable_schema = 1",
    "CREATE VIRTUAL TABLE v USING fts5(x)",
    "SELECT readfile('/etc/passwd')",
    "SELECT 1; DROP TABLE t",
    "SELECT " + "(" * 500 + "1" + ")" * 500,
    "SELECT 1" + " UNION SELECT 1" * 100,
    "SELECT 'x' LIKE '" + "%x" * 100 + "'",
    "\x00",
    "SELECT '\ud800'",
]

ANSWERED_SQL = [
    "SELECT printf('%1000000000d', 1)",
    "SELECT '" + "a" * 19_000 + "' LIKE '" + "%a" * 24 + "b'",
    "SELECT '" + "a" * 19_000 + "' GLOB '" + "*a" * 24 + "b'",
    "SELECT " + "9" * 5_000,
    "-- nothing",
]
"""What is cut short, or costs little, and is answered."""


@pytest.mark.parametrize("statement", HOSTILE_SQL, ids=range(len(HOSTILE_SQL)))
def test_hostile_sql_is_an_error_in_time_and_changes_nothing(statement: str) -> None:
    start = time.monotonic()
    found = run("database", SCRIPT, [("sql", {"statement": statement})])
    assert time.monotonic() - start < 5.0
    assert found.results[0].startswith("error: ")
    assert found.state == run("database", SCRIPT, []).state


@pytest.mark.parametrize("statement", ANSWERED_SQL, ids=range(len(ANSWERED_SQL)))
def test_odd_sql_is_answered_in_time_and_briefly(statement: str) -> None:
    start = time.monotonic()
    found = run("database", SCRIPT, [("sql", {"statement": statement})])
    assert time.monotonic() - start < 5.0
    assert len(found.results[0]) < 5_000
    assert found.state == run("database", SCRIPT, []).state


@pytest.mark.parametrize(
    "path",
    [
        *("../etc/passwd", "/../x", "a/../../x", "", "/", ".", "..", "a\x00b", "a\nb", "x" * 201),
        *("../" * 60 + "etc/passwd", "\ud800"),
    ],
)  # fmt: skip
def test_paths_stay_within(path: str) -> None:
    calls: Calls = [
        ("write_file", {"path": path, "content": "x"}),
        ("read_file", {"path": path}),
        ("move_file", {"path": "a", "to": path}),
    ]
    found = run("files", {"a": "1"}, calls)
    assert all(result.startswith("error: ") for result in found.results)
    assert found.state == {"a": "1"}


@pytest.mark.parametrize(
    "expression",
    [
        *("9**9**9", "'a' * 10**9", "'text'", "[1]", "1 / 0", "10**400 * 1.0", "1e308 * 10"),
        *("-" * 499, "__import__('os')", "ans.__class__", "(-8) ** 0.5", "x" * 600, "", "True"),
    ],
)  # fmt: skip
def test_huge_numbers_and_other_values_are_errors(expression: str) -> None:
    start = time.monotonic()
    found = run("calculator", None, [("calculate", {"expression": expression})])
    assert time.monotonic() - start < 1.0
    assert found.results[0].startswith("error: ")
    assert found.state == {"ans": 0}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD: list[Any] = [None, 5, "text", [], {}, {"key": None}, {"key": 5}, {"key": ["a"]}, {"x": 1}]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_arguments_that_do_not_fit_are_errors_and_change_nothing(kind: str) -> None:
    odd = [*ODD, {"key": nested(5_000)}, {"key": "a" * 30_000}, {1: 2}, {"key": 10**5_000}, {"a"}]
    odd += [{"key": float("nan")}, nested(100_000)]
    names = [tool["name"] for tool in tools_of(kind) if tool["parameters"]["required"]]
    calls: list[tuple[str, Any]] = [(name, arguments) for name in names for arguments in odd]
    for number in range(0, len(calls), MAX_CALLS):
        found = run(kind, None, calls[number : number + MAX_CALLS])
        assert all(result.startswith("error: ") for result in found.results)
        assert found.state == run(kind, None, []).state
    assert run(kind, None, [("fly", {})]).results[0].startswith("error: no tool 'fly', there is")


def test_a_full_store_and_a_full_disk_say_so() -> None:
    big = "x" * 15_000
    calls: Calls = [("write_file", {"path": f"f{n}", "content": big}) for n in range(20)]
    found = run("files", None, calls)
    assert found.results[12:14] == ["written", "error: the disk is full"]
    many = {f"k{n}": "" for n in range(1_000)}
    found = run("store", many, [("set", {"key": "more", "value": ""})])
    assert found.results == ["error: there are 1000 keys already"]


def test_further_calls_than_the_bound_are_not_made() -> None:
    calls: Calls = [("calculate", {"expression": "ans + 1"})] * (MAX_CALLS + 5)
    found = run("calculator", None, calls)
    assert found.state == {"ans": MAX_CALLS}
    assert found.results[-1].startswith("error: more than")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"kind": "browser"},
        {"kind": "store", "begin": {}},
        {"kind": "store", "start": []},
        {"kind": "store", "start": {"a": 1}},
        {"kind": "files", "start": {"../a": "x"}},
        {"kind": "files", "start": {"a": "x", "a/b": "y"}},
        {"kind": "calculator", "start": {"a": "1"}},
        {"kind": "calculator", "start": {"a": True}},
        {"kind": "database", "start": "CREATE"},
        {"kind": "database", "start": {}},
    ],
)
def test_a_start_that_cannot_be_is_an_error(environment: dict[str, Any]) -> None:
    with pytest.raises(RewardError):
        replay(environment, [])


def test_what_prompts_show_are_json_schemas() -> None:
    for kind in KINDS:
        for tool in tools_of(kind):
            assert tool["description"]
            assert invalid([], tool["parameters"])


def test_the_same_calls_always_lead_to_the_same() -> None:
    statements = ["INSERT INTO t VALUES ('c', 3)", "SELECT * FROM t", "DELETE FROM t WHERE n < 3"]
    calls: Calls = [("sql", {"statement": statement}) for statement in statements]
    assert run("database", SCRIPT, calls) == run("database", SCRIPT, calls)
