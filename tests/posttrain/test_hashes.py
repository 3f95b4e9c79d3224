"""A file's hash is its content's, however much of it is remembered."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from posttrain import hashes
from posttrain.hashes import FileHashes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_that_is_as_it_was_is_not_read_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    time.sleep(0.02)
    memory = tmp_path / "hashes.json"
    assert FileHashes(memory).of(file) == sha256(b"one")
    reads: list[object] = []
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: reads.append(given))
    assert FileHashes(memory).of(file) == sha256(b"one")
    assert not reads


def test_a_copy_in_its_place_is_read_even_where_size_and_times_are_preserved(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_S", 0.0)
    time.sleep(0.02)
    memory, other = tmp_path / "hashes.json", tmp_path / "other"
    other.write_bytes(b"two")
    FileHashes(memory).of(file)
    shutil.copystat(file, other)
    shutil.copy2(other, file)  # the same inode
    assert FileHashes(memory).of(file) == sha256(b"two")
    other.write_bytes(b"six")
    shutil.copystat(file, other)
    other.replace(file)  # another inode
    assert FileHashes(memory).of(file) == sha256(b"six")
    os.utime(file, ns=(0, 0))
    assert FileHashes(memory).of(file) == sha256(b"six")


def test_a_file_that_just_changed_is_not_remembered(file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "hashes.json"
    assert FileHashes(memory).of(file) == sha256(b"one")
    assert not memory.exists()
    assert FileHashes().of(file) == sha256(b"one")
