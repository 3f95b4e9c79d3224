"""A run that this machine cannot hold is refused before it starts, with the numbers."""

from pathlib import Path

import pytest

from posttrain.errors import InsufficientResources
from posttrain.pipeline.resources import available_memory_gb, check_resources


def test_a_small_run_fits(tmp_path: Path) -> None:
    check_resources(tmp_path / "runs" / "x", num_workers=1, num_checkpoints=1, checkpoint_gb=0.0)


def test_too_much_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InsufficientResources, match=r"GB of disk free.*1006000\.5 GB.*--dir"):
        check_resources(tmp_path, num_workers=1, num_checkpoints=1000, checkpoint_gb=1000.0)


def test_too_much_memory_is_refused(tmp_path: Path) -> None:
    available_gb = available_memory_gb()
    if available_gb is None:
        pytest.skip("this system does not say how much memory it has")
    with pytest.raises(InsufficientResources, match=r"100000 jobs side by side.*num_workers"):
        check_resources(tmp_path, num_workers=100_000, num_checkpoints=0, checkpoint_gb=0.0)


def test_a_judge_needs_its_own_memory_in_each_worker(tmp_path: Path) -> None:
    if available_memory_gb() is None:
        pytest.skip("this system does not say how much memory it has")
    with pytest.raises(InsufficientResources, match=r"3 jobs side by side need about 3003\.5 GB"):
        check_resources(
            tmp_path, num_workers=3, num_checkpoints=0, checkpoint_gb=0.0, judge_gb=1000.0
        )
