"""Safetensors files read and written tensor by tensor, as bytes: headers first, so that what is
wrong with a file is said before a number is read, and an untouched tensor is copied as it is.

The format (safetensors): 8 bytes little-endian n, n bytes of JSON {name: {dtype, shape,
data_offsets}}, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class OfficialError(ValueError):
    """A checkpoint in the official layout is incomplete, damaged or of another shape."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: `Entry(Path("a.safetensors"), "BF16", (4, 8), start=96, stop=160)`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Bytes from the beginning of the file."""
    stop: int

    @property
    def words(self) -> str:
        """Dtype and shape, for a message."""
        return f"{self.dtype} {list(self.shape)}"


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files, by name; of those its index names, where there
    is one.

    Raises:
        OfficialError: no files, one that is missing, truncated or no safetensors file, a tensor in
        another file than the index says or in two.
    """
    index = directory / INDEX
    named: dict[str, str] | None = None
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict):
            raise OfficialError(f"{index} has no weight_map")
    files = sorted(set(named.values())) if named else _names(directory)
    if not files:
        raise OfficialError(f"{directory} holds no safetensors file")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(directory / file).items():
            if name in entries:
                raise OfficialError(
                    f"{name} is in two files: {entries[name].file} and {entry.file}"
                )
            entries[name] = entry
    for name, file in (named or {}).items():
        if name not in entries or entries[name].file.name != file:
            raise OfficialError(f"{index} says {name} is in {file}, and it is not there")
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, in the order of their bytes.

    Raises:
        OfficialError: as `read_entries`.
    """
    if not path.is_file():
        raise OfficialError(f"{path} is missing: the index names it")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise OfficialError(f"{path} is truncated: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise OfficialError(f"{path} is no safetensors file: {error}") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, at, 8 + length) for name, at in header.items()}
    for name, entry in entries.items():
        if entry.stop > size:
            raise OfficialError(
                f"{path} is truncated: tensor {name} ({entry.words}) ends at byte {entry.stop}, "
                f"and the file has {size}"
            )
    in_order = dict(sorted(entries.items(), key=lambda item: item[1].start))
    place = 8 + length
    for name, entry in in_order.items():
        if entry.start != place:
            raise OfficialError(f"{path}: tensor {name} is at {entry.start}, expected {place}")
        place = entry.stop
    if place != size:
        raise OfficialError(f"{path} has {size - place} bytes after its last tensor")
    return in_order


def read_bytes(entry: Entry) -> bytearray:
    """A tensor's bytes."""
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        data = bytearray(entry.stop - entry.start)
        if file.readinto(data) != len(data):
            raise OfficialError(f"{entry.file} became shorter while it was read")
    return data


def read_tensor(entry: Entry) -> Tensor:
    """A tensor, in memory of its own."""
    data = read_bytes(entry)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(DTYPES[entry.dtype]).reshape(entry.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as safetensors keeps them: row by row, little-endian."""
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file of these tensors (name to dtype and shape), in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        end = place + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def copy_header(path: Path) -> bytes:
    """The first bytes of a file, up to its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def write_file(path: Path, parts: Iterable[bytes | bytearray | memoryview]) -> None:
    """A file of these parts, one in memory at a time, flushed to disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(directory: Path) -> Generator[Path]:
    """A folder to fill that becomes `directory` when all is well, and is removed when not.

    Raises:
        OfficialError: there is something in `directory` already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OfficialError(f"{directory} is there already: remove it, or choose another name")
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with this number
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(directory)
    _sync_folder(directory.parent)


def copy_others(source: Path, target: Path, *, written: Callable[[str], bool]) -> None:
    """Tokenizer, generation config and whatever else lies beside the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and not written(path.name):
            shutil.copyfile(path, target / path.name)


def _entry(path: Path, name: str, at: Any, start: int) -> Entry:
    try:
        dtype, shape, (first, last) = at["dtype"], tuple(at["shape"]), at["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise OfficialError(f"{path}: the header's words on {name} are none: {at}") from None
    if dtype not in DTYPES:
        raise OfficialError(f"{path}: tensor {name} has the unknown dtype {dtype}")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise OfficialError(
            f"{path}: tensor {name} has {last - first} bytes, which are no {dtype} {list(shape)}"
        )
    return Entry(path, dtype, shape, start + first, start + last)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise OfficialError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise OfficialError(f"{path} holds no JSON object")
    return found


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
