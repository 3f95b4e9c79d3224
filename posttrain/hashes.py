"""sha256 of large files, remembered, so that files that are as they were are not read again."""

import hashlib
import json
import time
from pathlib import Path

from posttrain.files import write_atomic

SETTLED_S = 2.0
"""A file changed less than so long ago could change again at the same time of the file system's
clock: its hash is not remembered."""


class FileHashes:
    """Hashes by path; `memory` is the file that remembers them, None: nothing does.

    A file is as it was if its inode, its size, and the times at which its content and its inode
    changed are: a copy put in its place, times preserved or not, is another.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        has_memory = memory is not None and memory.exists()
        self._known: dict[str, list[int | str]] = (
            json.loads(memory.read_text(encoding="utf-8")) if memory and has_memory else {}
        )

    def of(self, path: Path) -> str:
        """The sha256 of a file's content, as hex."""
        name, state = str(path.resolve()), _state(path)
        if (known := self._known.get(name)) and known[:-1] == state:
            return str(known[-1])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if self._memory and time.time_ns() - max(state[2:]) > SETTLED_S * 1e9:
            self._known[name] = [*state, found]
            write_atomic(self._memory, json.dumps(self._known))
        return found


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
