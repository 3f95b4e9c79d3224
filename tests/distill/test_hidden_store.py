"""Hidden states come back as they were written, once, from memory or disk, after any kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.hidden_store import HEADER_BYTES, HiddenStore, row_key, write_row
from distill.reverse_kl import reverse_kl

HOME = Path(__file__).resolve().parents[2]


def row(seed: int = 0, *, num_tokens: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, 7, generator=generator).to(dtype)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    """In the place of /dev/shm."""
    folder = tmp_path / "memory"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_rows_keep_every_bit_and_two_bytes_a_number_where_they_are_narrow(
    tmp_path: Path, dtype: torch.dtype, num_tokens: int
) -> None:
    written = row(num_tokens=num_tokens, dtype=dtype)
    store = HiddenStore(tmp_path / "disk", memory_bytes=1 << 20)
    path = store.place("a", 0)
    write_row(path, written)
    found = store.find("a")
    assert found is not None
    assert torch.equal(found.read(), written)
    assert found.read().dtype == dtype
    assert path.stat().st_size == HEADER_BYTES + num_tokens * 7 * dtype.itemsize
    store.close()


def test_reading_maps_and_does_not_copy(tmp_path: Path, memory: Path) -> None:
    store = HiddenStore(tmp_path / "disk", memory_bytes=1 << 20, shared_memory=memory)
    store.put("a", row())
    found = store.find("a")
    assert found is not None
    held = found.read()
    with Path("/proc/self/maps").open() as maps:
        (line,) = [line for line in maps if line.rstrip().endswith(found.path)]
    start = int(line.partition("-")[0], 16)
    assert held.data_ptr() == start + HEADER_BYTES
    held[0] = 0.0  # a private copy of that page
    assert torch.equal(found.read(), row())


def test_past_the_budget_rows_go_to_disk_and_freed_ones_make_room(
    tmp_path: Path, memory: Path
) -> None:
    size = HEADER_BYTES + row().numel() * 4
    store = HiddenStore(tmp_path / "disk", memory_bytes=2 * size, shared_memory=memory)
    for name in "abc":
        store.put(name, row())
    homes = {name: store.place(name, 0).is_relative_to(memory) for name in "abc"}
    assert homes == {"a": True, "b": True, "c": False}
    store.free(["a"])
    assert store.find("a") is None
    store.put("d", row(1))
    assert store.place("d", 0).is_relative_to(memory)
    assert store.memory_left == 0
    store.free("bcd")
    assert store.memory_left == 2 * size


def test_a_freed_row_stays_with_who_holds_it(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "disk", memory_bytes=0)
    held = store.put("a", row()).read()
    store.free(["a", "never-there"])
    assert torch.equal(held, row())


def test_a_restart_finds_what_was_written_whole(tmp_path: Path, memory: Path) -> None:
    def store() -> HiddenStore:
        return HiddenStore(tmp_path / "disk", memory_bytes=600, shared_memory=memory)

    first = store()
    paths = {name: Path(first.put(name, row(i)).path) for i, name in enumerate("abcdef")}
    assert {path.parent for path in paths.values()} == {tmp_path / "disk", paths["a"].parent}
    left = first.memory_left
    second = store()
    assert second.memory_left == left
    for i, name in enumerate("abcdef"):
        found = second.find(name)
        assert found is not None
        assert torch.equal(found.read(), row(i))
    torn = paths["a"].read_bytes()
    paths["a"].write_bytes(torn[:-1])  # short
    paths["b"].write_bytes(torn[:-4] + b"\0\0\0\0")  # zeros after a power cut
    paths["e"].write_bytes(b"")
    (tmp_path / "disk" / "f.77.tmp").write_bytes(torn)  # killed while it was written
    third = store()
    assert {name for name in "abcdef" if third.find(name)} == set("cdf")
    assert len(third) == 3
    assert not (tmp_path / "disk" / "f.77.tmp").exists()


WRITER = """
import sys, torch
from pathlib import Path
from distill.hidden_store import write_row
for number in range(10**6):
    write_row(Path(sys.argv[1]) / f"row-{number % 50}", torch.full((200, 64), float(number % 50)))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_rows_only(tmp_path: Path) -> None:
    HiddenStore(tmp_path, memory_bytes=0)
    environment = {**os.environ, "PYTHONPATH": str(HOME)}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path], env=environment, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 60:
            pass
        time.sleep(0.0123)
        writer.send_signal(signal.SIGKILL)
    store = HiddenStore(tmp_path, memory_bytes=0)
    assert len(store) == 50
    for number in range(50):
        found = store.find(f"row-{number}")
        assert found is not None
        assert torch.equal(found.read(), torch.full((200, 64), float(number)))


def test_memory_of_runs_that_are_gone_is_given_back(tmp_path: Path, memory: Path) -> None:
    for name in ("gone", "alive"):
        HiddenStore(tmp_path / name, memory_bytes=1 << 20, shared_memory=memory).put("a", row())
    assert len(list(memory.iterdir())) == 2
    (tmp_path / "gone").rename(tmp_path / "gone elsewhere")
    other = HiddenStore(tmp_path / "other", memory_bytes=1 << 20, shared_memory=memory)
    assert len(list(memory.iterdir())) == 2  # alive's and other's
    other.close()
    assert len(list(memory.iterdir())) == 1
    assert not (tmp_path / "other").exists()


def test_a_row_is_named_by_teacher_tokens_and_positions() -> None:
    keys = [
        row_key("t", [1, 2, 3], [0]),
        row_key("u", [1, 2, 3], [0]),
        row_key("t", [1, 2], [3, 0]),  # the same numbers, cut elsewhere
        row_key("t", [1, 2, 3], [1]),
        row_key("t", [1, 2, 4], [0]),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == row_key("t", [1, 2, 3], [0])


def test_the_rounding_floor_of_a_row_in_the_kl() -> None:
    # student == teacher in float64: all that is left is what storing the hidden states rounds off
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 64, dtype=torch.float64, generator=generator)
    head = torch.randn(1000, 64, dtype=torch.float64, generator=generator) / 64**0.5 * 2
    floor = {
        dtype: float(reverse_kl(hidden, head, [(hidden.to(dtype).double(), head)]).loss)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    assert abs(floor[torch.float64]) < 1e-14
    assert abs(floor[torch.float32]) < 1e-6
    assert 2e-6 < floor[torch.bfloat16] < 3e-5


def test_a_store_without_a_budget_claims_no_memory_but_finds_its_own(
    tmp_path: Path, memory: Path
) -> None:
    HiddenStore(tmp_path / "none", memory_bytes=0, shared_memory=memory)
    assert list(memory.iterdir()) == []
    HiddenStore(tmp_path / "some", memory_bytes=1 << 20, shared_memory=memory).put("a", row())
    found = HiddenStore(tmp_path / "some", memory_bytes=0, shared_memory=memory).find("a")
    assert found is not None
    assert torch.equal(found.read(), row())
