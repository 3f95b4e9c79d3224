"""What numba compiles is kept by the text of all loops, found by every process, and goes when it is
used no more."""

import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from posttrain import compiled_loops
from posttrain.backbone.host import use_host_loops
from posttrain.backbone.host.loops import loop
from posttrain.compiled_loops import LOOPS, UNUSED_DAYS, is_built, kept_in, remove_unused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Where things are kept; nothing is yet."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for asked in (kept_in, is_built):
        asked.cache_clear()
    yield tmp_path
    for asked in (kept_in, is_built):
        asked.cache_clear()


def thrice(x: int) -> int:
    return 3 * x


def test_loops_are_kept_by_the_text_of_all_of_them_and_go_without_where_nothing_can_be_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(kept_in())
    assert folder.parent == cache / "posttrain"
    assert folder.is_dir()
    own, read_bytes = LOOPS / "sums.py", Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read_bytes(path) + (b"#" if path == own else b"")
    )
    kept_in.cache_clear()
    assert Path(kept_in()) != folder
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    kept_in.cache_clear()
    assert kept_in() == ""
    assert loop(thrice)(2) == 6
    config: Any = vars(numba)["config"]
    assert config.CACHE_DIR == ""


@pytest.mark.usefixtures("cache")
def test_where_the_loops_cannot_be_compiled_torch_does_it_and_what_is_built_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_loops.sys, "executable", "false")
    assert not use_host_loops(torch.zeros(1))
    assert "torch stands in" in caplog.text
    (Path(kept_in()) / "done").touch()
    is_built.cache_clear()
    assert use_host_loops(torch.zeros(1))


def test_what_nobody_has_asked_for_in_a_month_goes_but_not_what_is_in_use(cache: Path) -> None:
    own = Path(kept_in())
    names = ("own", "old", "recent", "compiling", "strange")
    folders = {name: own.with_name(f"loops-{name}") for name in names} | {"own": own}
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    for name, folder in folders.items():
        folder.mkdir(exist_ok=True)
        (folder / "kept.nbc").touch()
        if name != "strange":
            (folder / "lock").touch()
            age = time.time() if name == "recent" else long_ago
            os.utime(folder / "lock", (age, age))
    other = cache / "posttrain" / "something"
    other.mkdir()
    with (folders["compiling"] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_unused(own)
    left = {name for name, folder in folders.items() if folder.exists()}
    assert left == set(names) - {"old"}
    assert other.exists()


def test_what_is_asked_for_is_in_use(cache: Path) -> None:
    lock, done = Path(kept_in()) / "lock", Path(kept_in()) / "done"
    for path in (lock, done):
        path.touch()
        os.utime(path, (0, 0))
    assert is_built()
    assert time.time() - lock.stat().st_mtime < 60
    remove_unused(cache / "posttrain" / "loops-of-another-version")
    assert done.exists()
