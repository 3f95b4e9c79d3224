"""An SQLite database in memory: an SQL script to start with.

SQL that would run for ever, fill memory or reach a disk ends in an error: steps are counted, sizes
limited, and ATTACH, PRAGMA, extensions and random numbers refused.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any, ClassVar

from rewards.environments.base import Tool, ToolError, text
from rewards.score import RewardError

MAX_STEPS = 1_000_000
"""Instructions of SQLite's machine in one call: about a tenth of a second."""
MAX_STEPS_IN_ALL = 5_000_000
"""In all calls of one conversation, since they are made again for every turn."""
STEPS_BETWEEN_CHECKS = 10_000
MAX_ROWS = 100
"""Of an answer."""
MAX_HEAP = 64 << 20
"""Bytes that all SQLite databases of the process may take."""

LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 50_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 50,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 10,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 5,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

REFUSED = {
    sqlite3.SQLITE_ATTACH,
    sqlite3.SQLITE_DETACH,
    sqlite3.SQLITE_PRAGMA,
    sqlite3.SQLITE_CREATE_VTABLE,
    sqlite3.SQLITE_DROP_VTABLE,
}
REFUSED_FUNCTIONS = {"load_extension", "random", "randomblob", "sqlite_version", "changes"}


class Database:
    """One connection, each statement a transaction of its own unless the model begins one."""

    def __init__(self, start: object) -> None:
        if start is not None and not isinstance(start, str):
            raise RewardError(f"a database starts from an SQL script, not from {start!r}")
        self._checks_left = MAX_STEPS_IN_ALL // STEPS_BETWEEN_CHECKS
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")
        self._connection.execute("PRAGMA temp_store = MEMORY")  # sorting reaches no disk
        self._connection.execute("PRAGMA max_page_count = 2000")  # 8 MB
        for which, value in LIMITS.items():
            self._connection.setlimit(which, value)
        self._connection.set_authorizer(_allowed)
        try:
            self._connection.executescript(start or "")
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise RewardError(f"a database cannot start with its script: {error}") from error

    def sql(self, statement: str) -> str:
        try:
            columns, rows = self._run(statement)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise ToolError(str(error)) from error
        if not columns:
            return "done"
        lines = [json.dumps(columns), *(json.dumps(row, default=repr) for row in rows[:MAX_ROWS])]
        return "\n".join(lines) + ("\n... (more rows)" if len(rows) > MAX_ROWS else "")

    def state(self) -> dict[str, Any]:
        """Every table's columns and rows, the rows in an order of their own."""
        try:
            self._checks_left = MAX_STEPS // STEPS_BETWEEN_CHECKS
            _, tables = self._run("SELECT name FROM sqlite_schema WHERE type = 'table'")
            return {name: self._table(name) for (name,) in tables}
        except (sqlite3.Error, MemoryError) as error:  # too large to be read in MAX_STEPS
            return {"error": str(error)}

    def _table(self, name: str) -> dict[str, Any]:
        quoted = name.replace('"', '""')
        columns, rows = self._run(f'SELECT * FROM "{quoted}"', max_rows=100_000)
        written = [[x.hex() if isinstance(x, bytes) else x for x in row] for row in rows]
        return {"columns": columns, "rows": sorted(written, key=repr)}

    def _run(
        self, statement: str, *, max_rows: int = MAX_ROWS + 1
    ) -> tuple[list[str], list[tuple[Any, ...]]]:
        left = [min(MAX_STEPS // STEPS_BETWEEN_CHECKS, self._checks_left)]

        def is_over() -> bool:
            left[0] -= 1
            self._checks_left -= 1
            return left[0] < 0

        self._connection.set_progress_handler(is_over, STEPS_BETWEEN_CHECKS)
        cursor = self._connection.execute(statement)
        try:
            rows = cursor.fetchmany(max_rows)
        finally:
            cursor.close()
        return [column[0] for column in cursor.description or ()], rows

    TOOLS: ClassVar[Mapping[str, Tool]] = {
        "sql": Tool(
            "Run one SQL statement; an answer is its columns, then a row a line, as JSON.",
            {"statement": text("SQLite's SQL.", minLength=1)},
            sql,
        ),
    }


def _allowed(action: int, first: str | None, second: str | None, *_: object) -> int:
    is_refused = action in REFUSED or (
        action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in REFUSED_FUNCTIONS
    )
    return sqlite3.SQLITE_DENY if is_refused else sqlite3.SQLITE_OK
