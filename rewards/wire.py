"""What graders and their processes say to each other: frames behind a length, JSON lines back.

A frame is a pickle, or to and from the sandbox JSON.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

HEADER = struct.Struct(">Q")
"""The number of bytes of the frame that follows."""


@dataclass(frozen=True, slots=True)
class Setup:
    """`Setup({"exact": 1.0}, None, timeout_s=5, memory_gb=4, parent=47, is_main_thread=True)`."""

    rewards: dict[str, float]
    folder: Path | None
    timeout_s: float
    memory_gb: float
    parent: int
    """Process id of the grader's process."""
    is_main_thread: bool
    """Whether its main thread started this one: the kernel's parent-death signal is by thread."""


def read_frame(stream: BinaryIO) -> bytes | None:
    """The bytes behind the next length; None if the other side is gone, or has closed."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (size,) = HEADER.unpack(header)
    frame = stream.read(size)
    return frame if len(frame) == size else None


def write_frame(descriptor: int, frame: bytes) -> None:
    """The length, then the bytes, all of them."""
    rest = memoryview(HEADER.pack(len(frame)) + frame)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def send_json(stream: BinaryIO, reply: Mapping[str, Any]) -> None:
    """One line."""
    stream.write(json.dumps(reply, allow_nan=False).encode() + b"\n")
    stream.flush()
