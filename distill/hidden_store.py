"""Teachers' hidden states between those who made them and the learner: a file a row, in memory that
processes share (/dev/shm) up to a budget, on disk past it.

A row is named by all that decides it (`row_key`), so that after a restart what was scored is found
and not scored again. Whoever scores writes the file, whole or not at all; the learner maps it,
reads it without a copy and frees it. Rows keep the dtype in which their teacher computed. Its
rounding is a floor under every KL: about 1e-5 nats in bfloat16 (2 * H bytes a token), 1e-6 and less
in float32.

    64 bytes: magic, dtype, crc32, tokens, H; then tokens * H numbers

Shapes: N tokens of a row, H hidden size.
"""

import errno
import hashlib
import logging
import os
import secrets
import shutil
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from posttrain.files import write_atomic

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "posttrain-hidden-"
OWNER, PLACE = "owner", "memory"
"""Which disk folder memory belongs to, and, in that folder, where its memory is."""

MAGIC = b"hidden-1"
HEADER = struct.Struct("<8sIIQQ")
HEADER_BYTES = 64
"""Numbers begin at a cache line."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class HiddenRow:
    """Where a row's hidden states are: `HiddenRow("/dev/shm/posttrain-hidden-1a/9f...")`. It
    travels in the place of the numbers."""

    path: str

    def read(self) -> Tensor:
        """The numbers (N, H), mapped and not copied: valid for as long as they are held, freed or
        not. Changes to them stay in this process."""
        return _map(Path(self.path))


def row_key(teacher: str, input_ids: Sequence[int], positions: Sequence[int]) -> str:
    """A row's name: what it holds follows from the teacher's identity, dtype included, the tokens
    that it reads and the positions that are kept."""
    digest = hashlib.sha256(f"{teacher}\0{len(input_ids)}\0".encode())
    digest.update(array("q", [*input_ids, *positions]).tobytes())
    return digest.hexdigest()[:40]


def write_row(path: Path, hidden_NH: Tensor) -> None:
    """Put a row there, whole or not at all. A kill of the process leaves no part of it; after a
    power cut a checksum tells."""
    hidden_NH = hidden_NH.detach().cpu().contiguous()
    data = hidden_NH.view(torch.uint8).numpy().data
    header = HEADER.pack(MAGIC, DTYPES.index(hidden_NH.dtype), zlib.crc32(data), *hidden_NH.shape)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(header.ljust(HEADER_BYTES, b"\0"))
        file.write(data)
    temporary.replace(path)


class HiddenStore:
    """The learner's side: where rows are to go, which are there, and what is free.

    One process owns it; others write rows where it says.
    """

    def __init__(
        self, folder: Path, *, memory_bytes: int, shared_memory: Path = SHARED_MEMORY
    ) -> None:
        """Takes up what an earlier one left in `folder`, on disk, and in the memory that belonged
        to it. At most half of the memory that is free is used, whatever the budget."""
        folder.mkdir(parents=True, exist_ok=True)
        self._disk = folder
        wants_memory = memory_bytes > 0 or (folder / PLACE).exists()
        is_claimed = wants_memory and shared_memory.is_dir()
        self._memory = _claim(folder, shared_memory) if is_claimed else None
        self._num_free = 0
        if self._memory:
            self._num_free = min(memory_bytes, shutil.disk_usage(self._memory).free // 2)
        self._kept: dict[str, tuple[Path, int]] = {}
        for home in filter(None, (self._memory, self._disk)):
            for path in home.iterdir():
                self._take_up(path)

    @property
    def memory_left(self) -> int:
        """Bytes of the budget that are free."""
        return self._num_free

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: str) -> HiddenRow | None:
        """The row, if it is there."""
        path, _ = self._kept.get(key, (None, 0))
        return HiddenRow(str(path)) if path and path.exists() else None

    def place(self, key: str, num_bytes: int) -> Path:
        """Where to write a row of about `num_bytes`: in memory while the budget lasts. `free` gives
        the room back, written or not."""
        if key not in self._kept:
            home, taken = self._disk, 0
            if self._memory and HEADER_BYTES + num_bytes <= self._num_free:
                home, taken = self._memory, HEADER_BYTES + num_bytes
            self._num_free -= taken
            self._kept[key] = home / key, taken
        return self._kept[key][0]

    def put(self, key: str, hidden_NH: Tensor) -> HiddenRow:
        """Write a row that came from another machine. On disk where memory is full after all."""
        path = self.place(key, hidden_NH.numel() * hidden_NH.element_size())
        try:
            write_row(path, hidden_NH)
        except OSError as error:
            if error.errno != errno.ENOSPC or path.parent == self._disk:
                raise
            self.free([key])
            path = self._disk / key
            self._kept[key] = path, 0
            write_row(path, hidden_NH)
        return HiddenRow(str(path))

    def free(self, keys: Iterable[str]) -> None:
        """Forget rows. Memory comes back when the last who mapped a row lets go of it."""
        for key in keys:
            path, taken = self._kept.pop(key, (None, 0))
            if path:
                path.unlink(missing_ok=True)
                self._num_free += taken

    def close(self) -> None:
        """Delete everything, on disk and in memory."""
        self._kept.clear()
        for home in filter(None, (self._memory, self._disk)):
            shutil.rmtree(home, ignore_errors=True)

    def _take_up(self, path: Path) -> None:
        """Index a row of an earlier process; what it did not finish is deleted."""
        if path.name in (OWNER, PLACE):
            return
        if path.suffix or not _is_whole(path):
            path.unlink()
            return
        taken = path.stat().st_size if path.parent == self._memory else 0
        self._num_free -= taken
        self._kept[path.name] = path, taken


def _claim(folder: Path, shared_memory: Path) -> Path:
    """The memory that belongs to the disk folder, new or left by an earlier process; what belongs
    to folders that are gone is deleted."""
    for other in shared_memory.glob(f"{PREFIX}*"):
        owner = other / OWNER
        if owner.exists() and not Path(owner.read_text(encoding="utf-8")).exists():
            shutil.rmtree(other, ignore_errors=True)
    named = folder / PLACE
    if named.exists():
        memory = Path(named.read_text(encoding="utf-8"))
        if memory.is_dir():
            return memory
    memory = shared_memory / f"{PREFIX}{secrets.token_hex(8)}"
    memory.mkdir(mode=0o700)
    write_atomic(memory / OWNER, str(folder.resolve()))
    write_atomic(named, str(memory))
    return memory


def _map(path: Path) -> Tensor:
    size = path.stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    _, dtype, _, num_tokens, width = HEADER.unpack(bytes(data[: HEADER.size].numpy()))
    return data[HEADER_BYTES:].view(DTYPES[dtype]).view(num_tokens, width)


def _is_whole(path: Path) -> bool:
    """Whether every byte of it is what was written."""
    data = path.read_bytes()
    if len(data) < HEADER_BYTES:
        return False
    magic, dtype, checksum, num_tokens, width = HEADER.unpack(data[: HEADER.size])
    if magic != MAGIC or dtype >= len(DTYPES):
        return False
    num_bytes = num_tokens * width * DTYPES[dtype].itemsize
    body = memoryview(data)[HEADER_BYTES:]
    return len(body) == num_bytes and zlib.crc32(body) == checksum
