"""A file system in memory: `{"notes/a.txt": "hello"}` to start with. It reaches no disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rewards.environments.base import Tool, ToolError, given, is_text, text
from rewards.score import RewardError

MAX_FILES = 500
MAX_CHARACTERS = 200_000
"""Of all files together."""

PATH = text("Such as notes/a.txt.", minLength=1, maxLength=200)
CONTENT = text("The text.")


class Files:
    """Paths are relative to the one root, `/`; folders are there as long as they hold a file."""

    def __init__(self, start: object) -> None:
        self._files: dict[str, str] = {}
        for path, content in given(start, is_text, what="paths and texts").items():
            try:
                self._put(_normal(path), content)
            except ToolError as error:
                raise RewardError(f"a file system cannot start with {path!r}: {error}") from error

    def read_file(self, path: str) -> str:
        return self._files[self._there(path)]

    def write_file(self, path: str, content: str) -> str:
        return self._put(_normal(path), content)

    def append_file(self, path: str, content: str) -> str:
        name = _normal(path)
        return self._put(name, self._files.get(name, "") + content)

    def delete_file(self, path: str) -> str:
        del self._files[self._there(path)]
        return "deleted"

    def move_file(self, path: str, to: str) -> str:
        source, target = self._there(path), _normal(to)
        content = self._files.pop(source)
        try:
            self._put(target, content)
        except ToolError:
            self._files[source] = content
            raise
        return "moved"

    def list_files(self, folder: str = "/") -> str:
        inside = _normal(folder, may_be_root=True)
        found = [path for path in self._files if not inside or path.startswith(f"{inside}/")]
        return "\n".join(sorted(found)) or "no file"

    def state(self) -> dict[str, str]:
        return dict(self._files)

    def _there(self, path: str) -> str:
        name = _normal(path)
        if name not in self._files:
            raise ToolError(f"no file {name}")
        return name

    def _put(self, name: str, content: str) -> str:
        parents = name.split("/")[:-1]
        if any("/".join(parents[: i + 1]) in self._files for i in range(len(parents))):
            raise ToolError(f"{name} is within a file")
        if any(path.startswith(f"{name}/") for path in self._files):
            raise ToolError(f"{name} is a folder")
        rest = sum(len(text) for path, text in self._files.items() if path != name)
        if rest + len(content) > MAX_CHARACTERS or len(self._files) >= MAX_FILES:
            raise ToolError("the disk is full")
        self._files[name] = content
        return "written"

    TOOLS: ClassVar[Mapping[str, Tool]] = {
        "read_file": Tool("A file's text.", {"path": PATH}, read_file),
        "write_file": Tool(
            "Make or replace a file.", {"path": PATH, "content": CONTENT}, write_file
        ),
        "append_file": Tool(
            "Add to a file's end.", {"path": PATH, "content": CONTENT}, append_file
        ),
        "delete_file": Tool("Remove a file.", {"path": PATH}, delete_file),
        "move_file": Tool("Give a file another path.", {"path": PATH, "to": PATH}, move_file),
        "list_files": Tool(
            "The paths in a folder.",
            {"folder": text("All: /", default="/", maxLength=200)},
            list_files,
        ),
    }


def _normal(path: str, *, may_be_root: bool = False) -> str:
    """The path without `.` and `..`; ToolError where it leaves the root or names it."""
    if not path.isprintable():
        raise ToolError("the path has characters that cannot be printed")
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                raise ToolError(f"{path} is outside the root")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts and not may_be_root:
        raise ToolError(f"{path} is a folder")
    return "/".join(parts)
