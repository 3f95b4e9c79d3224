"""One worker of a pool in test_teachers_ranks.py: `python teacher_rank.py QUESTION RANK ANSWER`."""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from distill.teachers import TeacherPool


def main(question: Path, rank: int, answer: Path) -> None:
    torch.set_num_threads(1)
    found: list[Any] = []
    for options, readings in pickle.loads(question.read_bytes()):  # one pool after another
        pool = TeacherPool(rank=rank, device="cpu", timeout_s=60.0, **options)
        arrays = pool.score(readings[rank]) + pool.score(readings[rank][:1])
        ((adapters, _),) = pool._model._kept.values()  # pyright: ignore  # what this rank holds
        parameters = adapters.use(None).base_model.parameters()
        size = sum(getattr(p, "_local_tensor", p).numel() for p in parameters)
        found.append((arrays, size))
    answer.write_bytes(pickle.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
