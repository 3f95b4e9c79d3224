"""One learner rank of test_ranks.py: `python rank.py OUT RANK NUM_RANKS STRATEGY`."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import tiny_model
from test_learner import SHARES, TEACHERS, VOCAB, Update, mixed, scored

from distill.learner import Learner
from distill.mesh import Mesh, Strategy, meet
from posttrain.optim import build_optimizer

# the first and the last are answers of teachers
ROWS = [replace(row, by_teacher=i in (0, 4)) for i, row in enumerate(mixed("several teachers"))]
# four rows for the first of two ranks, in two micro-batches, and one row for the other
CUTS = {1: [ROWS], 2: [ROWS[:4], ROWS[4:]]}
# all rows for one rank, none for the other
LOPSIDED = {1: [ROWS], 2: [[], ROWS]}


def main(out: Path, rank: int, num_ranks: int, strategy: Strategy) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        meet(out / "meeting", rank=rank, num_ranks=num_ranks, timeout_s=60)
    mesh = Mesh(strategy, num_ranks=num_ranks)
    teachers = {name: tiny_model(i, VOCAB) for i, name in enumerate(TEACHERS.values(), start=1)}
    found: dict[str, Any] = {}
    for name, cuts in (("uneven", CUTS), ("lopsided", LOPSIDED)):
        update = Update(tiny_model(0, VOCAB), teachers, cuts[num_ranks][rank], mesh=mesh)
        found[name] = {"metrics": update.metrics, "gradients": update.gradients}
    found["training"] = training(mesh, teachers, CUTS[num_ranks][rank], out / f"{rank}.state")
    listening = psutil.Process().net_connections("inet")
    found["listens at"] = {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN}
    if rank == 0:
        torch.save(found, out / "found.pt")
    if num_ranks > 1:
        torch.distributed.destroy_process_group()


def training(mesh: Mesh, teachers: dict[str, Any], rows: Any, path: Path) -> dict[str, Any]:
    """Weights after two Muon steps, and after a third by a learner that went on from them."""

    def learner(seed: int) -> Learner:
        return Learner(
            tiny_model(seed, VOCAB),
            lambda model: build_optimizer(model, name="muon", learning_rate=1e-3),
            mesh=mesh,
            shares=SHARES,
            head=lambda name: teachers[name].get_output_embeddings().weight,
        )

    first = learner(0)
    for _ in range(2):
        first.step(scored(rows, teachers))
    state = first.state()
    torch.save(state, path)
    weights = copy.deepcopy(state["model"])  # on one rank the learner's own tensors
    first.step(scored(rows, teachers))
    second = learner(7)
    second.load(path, with_guard=True)
    second.step(scored(rows, teachers))
    resumed, straight = second.weights(), first.weights()
    return {"weights": weights, "straight": straight, "resumed": resumed}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])  # pyright: ignore[reportArgumentType]  # the test's own
