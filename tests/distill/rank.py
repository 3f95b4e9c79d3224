"""One learner rank of test_ranks.py: `python rank.py OUT RANK NUM_RANKS STRATEGY [vocab]`."""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import tiny_model
from heads import headed
from small_steps import OPTIMIZERS, SHARES, TEACHERS, VOCAB, Update, mixed, scored

from distill.batch import ScoredExample
from distill.learner import Learner
from distill.mesh import Mesh, Strategy, leave, meet
from posttrain.errors import StageError
from posttrain.optim import build_optimizer

# the first and the last are answers of teachers
ROWS = [replace(row, by_teacher=i in (0, 4)) for i, row in enumerate(mixed("several teachers"))]
# four rows for the first of two ranks, in two micro-batches, and one row for the other
CUTS = {1: [ROWS], 2: [ROWS[:4], ROWS[4:]], 3: [ROWS[:1], ROWS[1:4], ROWS[4:]]}
# all rows for one rank, none for the others
LOPSIDED = {1: [ROWS], 2: [[], ROWS], 3: [[], ROWS, []]}


def main(out: Path, rank: int, num_ranks: int, strategy: Strategy, *, vocab_parallel: bool) -> None:
    torch.set_num_threads(1)
    teachers = {name: tiny_model(i, VOCAB) for i, name in enumerate(TEACHERS.values(), start=1)}
    found: dict[str, Any] = {}
    for name, cuts, student in (
        ("uneven", CUTS, tiny_model(0, VOCAB)),
        ("lopsided", LOPSIDED, tiny_model(0, VOCAB)),
        ("uneven, biased", CUTS, headed("bias", 0, VOCAB)),
        ("lopsided, biased", LOPSIDED, headed("bias", 0, VOCAB)),
        ("uneven, divided", CUTS, headed("divided", 0, VOCAB)),
    ):
        if num_ranks > 1:  # each time anew, as the stages of a run do in one process
            meet(out / f"meeting-{name}", rank=rank, num_ranks=num_ranks, timeout_s=60)
        mesh = Mesh(strategy, num_ranks=num_ranks, vocab_parallel=vocab_parallel)
        update = Update(student, teachers, cuts[num_ranks][rank], mesh=mesh)
        found[name] = {"metrics": update.metrics, "gradients": update.gradients}
    rows = scored(CUTS[num_ranks][rank], teachers)
    broken = spoilt(rows) if rank == num_ranks - 1 else rows
    for optimizer in OPTIMIZERS[strategy]:
        path = out / f"{optimizer}{rank}.state"
        found[optimizer] = training(mesh, teachers, rows, broken, path, optimizer)
    if strategy in ("zero2", "zero3"):
        found["unreached"] = refusal(mesh, teachers, rows)
    listening = psutil.Process().net_connections("inet")
    found["listens at"] = {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN}
    if rank == 0:
        torch.save(found, out / "found.pt")
    if num_ranks > 1:
        leave()


def spoilt(rows: list[ScoredExample]) -> list[ScoredExample]:
    """The last one's teachers have no numbers."""
    hidden = {
        name: torch.full_like(torch.as_tensor(state), float("nan"))
        for name, state in rows[-1].teacher_hidden.items()
    }
    return [*rows[:-1], replace(rows[-1], teacher_hidden=hidden)]


def refusal(mesh: Mesh, teachers: dict[str, Any], rows: list[ScoredExample]) -> str:
    """Of a student whose block of further tokens is to learn, and learns nothing."""
    student = tiny_model(0, VOCAB, with_mtp=True)
    student.mtp.requires_grad_(True)
    try:
        learner(mesh, teachers, "adamw", student).step(rows)
    except StageError as error:
        return str(error)
    raise AssertionError("it took a step")


def learner(mesh: Mesh, teachers: dict[str, Any], optimizer: Any, model: Any) -> Learner:
    return Learner(
        model,
        lambda model: build_optimizer(model, name=optimizer, learning_rate=1e-3),
        mesh=mesh,
        shares=SHARES,
        head=lambda name: teachers[name].get_output_embeddings().weight,
    )


def training(
    mesh: Mesh,
    teachers: dict[str, Any],
    rows: list[ScoredExample],
    broken: list[ScoredExample],
    path: Path,
    optimizer: Any,
) -> dict[str, Any]:
    """State after two steps, after a third that was to be skipped, and weights after a fourth, of
    this learner and of one that went on from the first two."""
    first = learner(mesh, teachers, optimizer, tiny_model(0, VOCAB))
    for _ in range(2):
        first.step(rows)
    state = first.state()
    torch.save(state, path)
    before = copy.deepcopy(state)  # on one rank the learner's own tensors
    first.step(broken)
    found = {"before": before, "skipped": copy.deepcopy(first.state())}
    first.step(rows)
    second = learner(mesh, teachers, optimizer, tiny_model(7, VOCAB))
    second.load(path, with_guard=True)
    second.step(rows)
    return {**found, "resumed": second.weights(), "straight": first.weights()}


if __name__ == "__main__":
    place, number, many, how, *more = sys.argv[1:]
    main(Path(place), int(number), int(many), how, vocab_parallel=more == ["vocab"])  # pyright: ignore[reportArgumentType]  # the test's own
