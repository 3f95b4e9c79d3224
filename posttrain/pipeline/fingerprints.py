"""Hashes of what a recipe names and does not hold: checkpoints, and the modules of rewards."""

import hashlib
from pathlib import Path

from posttrain.domains import DomainSpec
from rewards import REWARDS

WHOLE_BYTES = 4 << 20
"""Files up to this size are read whole."""

NUM_SAMPLES = 64
SAMPLE_BYTES = 64 << 10


def checkpoint_fingerprint(folder: Path) -> str:
    """sha256 over a checkpoint's files: names, sizes, small files whole, large ones by samples.

    64 evenly spaced blocks of 64 KiB stand for a large file, so that hundreds of gigabytes take
    no more than a moment; training moves every weight, so that another checkpoint is seen.
    """
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder)}\0{size}\0{_digest(path, size)}\n".encode())
    return total.hexdigest()


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(NUM_SAMPLES):
                file.seek(index * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def named_modules(spec: DomainSpec) -> set[str]:
    """The modules of a domain's rewards and tools, which its stages run by name."""
    paths = [REWARDS.get(reward, reward) for reward in spec.graded_rewards]
    paths += [tool.python for tool in spec.tools]
    return {path.partition(":")[0] for path in paths}
