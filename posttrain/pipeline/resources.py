"""What a run needs of this machine, checked before anything is started."""

import shutil
from pathlib import Path

from posttrain.errors import InsufficientResources

GB = 1e9

RAY_GB = 0.5
"""Ray's own processes."""

WORKER_GB = 1.0
"""A worker with torch, transformers and trl imported, before it has a model."""

COPIES_AT_WORK = 5
"""Weights, gradients and optimizer state in fp32, and as much again for activations."""

SPARE_DISK_GB = 0.5


def check_resources(
    directory: Path,
    *,
    num_workers: int,
    num_checkpoints: int,
    checkpoint_gb: float,
    judge_gb: float = 0.0,
) -> None:
    """Raise InsufficientResources, with the numbers, where disk or memory will not do.

    `checkpoint_gb` is one model's size in fp32; `num_checkpoints` are still to be written; a judge
    of `judge_gb` is in each worker.
    """
    # each worker may hold two step checkpoints (weights and optimizer state) beside the results
    disk_gb = SPARE_DISK_GB + checkpoint_gb * (num_checkpoints + 6 * num_workers)
    free_gb = shutil.disk_usage(_existing(directory)).free / GB
    if free_gb < disk_gb:
        raise InsufficientResources(
            f"{directory} has {free_gb:.1f} GB of disk free, and the run writes up to "
            f"{disk_gb:.1f} GB: free some, or put the run elsewhere with --dir"
        )
    memory_gb = RAY_GB + num_workers * (WORKER_GB + COPIES_AT_WORK * checkpoint_gb + judge_gb)
    available_gb = available_memory_gb()
    if available_gb is not None and available_gb < memory_gb:
        raise InsufficientResources(
            f"{available_gb:.1f} GB of memory are available, and {num_workers} jobs side by side "
            f"need about {memory_gb:.1f} GB: set cluster.num_workers lower, or free some"
        )


def available_memory_gb() -> float | None:
    """Memory this process could still get, its container's limit included; None where unknown."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    machine_gb = int(fields["MemAvailable"].split()[0]) * 1024 / GB
    return min([machine_gb, *_cgroup_gb()])


def _cgroup_gb() -> list[float]:
    """What the container's memory limit leaves, in a list that is empty where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max":
        return []
    reclaimable = int(counters.get("inactive_file", 0))  # file cache, which gives way
    return [(int(limit) - used + reclaimable) / GB]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
