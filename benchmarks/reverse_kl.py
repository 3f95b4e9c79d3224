"""The reverse KL's loss and gradients beside its peers: `python benchmarks/reverse_kl.py`.

Hidden states and heads of a student and one teacher in, the mean loss and the gradients of the
student's two tensors out; float32 on one thread, with `--device cuda` bfloat16 on a GPU. Every peer
is a process of its own, which first runs once for its peak memory, above what it held with the
inputs, then in turn with the floor: the four matrix products that the loss cannot do without, in
tiles and strips like ours (the fastest found), and nothing else. Times are medians, in seconds of
processor time (on a GPU of the clock). Liger's is its fused linear JSD at beta = 1, as it is for
CPUs not compiled; `--liger FOLDER` says where it was installed (pip install --no-deps --target).
`--quick` takes half a minute, all of it half an hour and 12 GiB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measured import Json, forget_peak, machine, memory_mib, place, write
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.reverse_kl import default_tile_rows, reverse_kl
from distill.reverse_kl_tile import strip

CASES = {"cpu": ((4096, 512, 65_536), (2048, 512, 129_280)), "cuda": ((8192, 4096, 129_280),)}
"""Tokens, hidden size, vocabulary."""
QUICK = ((512, 128, 8192),)
TARGETS = {"share": 0.85, "trl": 2.7, "liger": 1.4, "memory": 0.1}
GPU_TARGET = 1.5


@dataclass(frozen=True)
class Problem:
    """The student's hidden states and head, and the teacher's."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.head


Peer = Callable[[Problem], Tensor]
"""The mean loss."""


def main() -> None:
    arguments = parse()
    if arguments.liger:
        sys.path.append(str(arguments.liger))
    if arguments.worker:
        torch.set_num_threads(1)
        peer, *sizes = arguments.worker
        found = measure(peer, [int(x) for x in sizes], arguments.device, arguments.repeats)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    peers = [name for name in PEERS if name.startswith(tuple(arguments.peers or ("",)))]
    if find_spec("liger_kernel") is None:
        peers = [name for name in peers if not name.startswith("liger")]
    data: Json = {**machine("torch", "trl"), "device": arguments.device, "rows": []}
    if arguments.device == "cuda":
        data["cpu"] = torch.cuda.get_device_name()
    numbers = arguments.page.with_suffix(".json")
    if arguments.peers and numbers.exists():  # the others' rows stay
        older: Json = json.loads(numbers.read_text("utf-8"))
        if older["device"] == arguments.device:
            data["rows"] = [{"date": older["date"], **row} for row in older["rows"]]
    for sizes in QUICK if arguments.quick else CASES[arguments.device]:
        for peer in peers:
            put(data["rows"], {"date": data["date"], **run_worker(peer, sizes, arguments)})
            write(arguments.page, data, page)


def put(rows: list[Json], found: Json) -> None:
    """In the place of the same peer's row, if there is one."""
    names = [(row["peer"], row["sizes"]) for row in rows]
    name = found["peer"], found["sizes"]
    at = names.index(name) if name in names else len(rows)
    rows[at : at + 1] = [found]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/reverse-kl.md"))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--peers", nargs="*", help="names, or how they begin; all by default")
    parser.add_argument("--liger", type=Path, help="a folder with liger_kernel")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(peer: str, sizes: Sequence[int], arguments: argparse.Namespace) -> Json:
    """One row of the table, from a process of its own."""
    sys.stderr.write(f"{peer}, {sizes} ...")
    sys.stderr.flush()
    started = time.monotonic()
    command = [sys.executable, __file__, "--worker", peer, *map(str, sizes)]
    command += ["--device", arguments.device, "--repeats", str(arguments.repeats)]
    command += ["--liger", str(arguments.liger)] if arguments.liger else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f" {time.monotonic() - started:.0f} s\n")
    return found


def measure(peer: str, sizes: Sequence[int], device: str, repeats: int) -> Json:
    """Peak memory, then seconds of the peer and of the floor in turn."""
    problem = draw(sizes, torch.device(device))
    held = held_mib(device)
    step(PEERS[peer], problem)
    peak = peak_mib(device) - held
    seconds: dict[str, list[float]] = {"peer": [], "floor": []}
    loss = 0.0
    for _ in range(repeats):
        before = clock(device)
        loss = step(PEERS[peer], problem)
        seconds["peer"].append(clock(device) - before)
        before = clock(device)
        products(problem)
        seconds["floor"].append(clock(device) - before)
    gradients = sum(x.numel() * x.element_size() for x in problem.leaves) / 2**20
    return {
        "peer": peer,
        "sizes": list(sizes),
        "seconds": statistics.median(seconds["peer"]),
        "floor_seconds": statistics.median(seconds["floor"]),
        "peak_mib": peak,
        "gradients_mib": gradients,
        "loss": loss,
        "load": round(os.getloadavg()[0], 1),
    }


def draw(sizes: Sequence[int], device: torch.device) -> Problem:
    """Logits of a few units, teacher and student close to one another."""
    num_rows, hidden, vocabulary = sizes
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(n, hidden, generator=generator) for n in (num_rows, vocabulary) for _ in "st"
    ]
    student, teacher, head, teacher_head = parts
    teacher = student + 0.3 * teacher
    heads = [3 * hidden**-0.5 * x for x in (head, head + 0.1 * teacher_head)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = [x.to(device, dtype) for x in (student, heads[0], teacher, heads[1])]
    return Problem(found[0].requires_grad_(), found[1].requires_grad_(), *found[2:])


def step(peer: Peer, problem: Problem) -> float:
    """Loss and gradients, which are dropped."""
    loss = peer(problem)
    loss.backward()
    assert all(x.grad is not None for x in problem.leaves)
    for x in problem.leaves:
        x.grad = None
    return loss.item()


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def held_mib(device: str) -> float:
    """What is held now; the peak is counted from here."""
    if device == "cpu":
        forget_peak()
        return memory_mib("VmRSS")
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**20


def peak_mib(device: str) -> float:
    return memory_mib("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


@torch.no_grad()
def products(problem: Problem) -> None:
    """The floor."""
    hidden, head = problem.leaves
    num_rows, vocabulary = len(hidden), len(head)
    size = min(default_tile_rows(hidden.device, vocabulary), num_rows)
    logits, others = (strip(hidden, hidden.dtype, size, vocabulary) for _ in range(2))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        part, other = (x[: len(hidden[rows])] for x in (logits, others))
        torch.mm(hidden[rows], head.T, out=part)
        torch.mm(problem.teacher_hidden[rows], problem.teacher_head.T, out=other)
        torch.mm(part, head, out=grad_hidden[rows])
        grad_head.addmm_(part.T, hidden[rows])


def ours(problem: Problem) -> Tensor:
    teacher = (problem.teacher_hidden, problem.teacher_head)
    return reverse_kl(*problem.leaves, [teacher]).loss


def trl(problem: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head = problem.leaves
    teacher = (problem.teacher_hidden, problem.teacher_head)
    kl_N, _ = ChunkedDivergenceFunction.apply(hidden, head, None, *teacher, None, 1.0, 1.0)
    return kl_N.mean()


def liger(chunk_size: int) -> Peer:
    def run(problem: Problem) -> Tensor:
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]  # optional
            LigerFusedLinearJSDLoss,
        )

        labels_N = torch.zeros(len(problem.hidden), dtype=torch.long, device=problem.hidden.device)
        loss: Any = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=1.0,
            compiled=problem.hidden.is_cuda,
            chunk_size=chunk_size,
        )
        teacher = (problem.teacher_hidden, problem.teacher_head)
        return loss(*problem.leaves, *teacher, labels_N)

    return run


def dense(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """The sum of the tokens' KLs, all logits at once."""
    logp_NV = (hidden @ head.T).float().log_softmax(dim=-1)
    logq_NV = (teacher_hidden @ teacher_head.T).float().log_softmax(dim=-1)
    return torch.nn.functional.kl_div(logq_NV, logp_NV, reduction="sum", log_target=True)


def naive(problem: Problem) -> Tensor:
    total = dense(*problem.leaves, problem.teacher_hidden, problem.teacher_head)
    return total / len(problem.hidden)


def checkpointed(problem: Problem, rows: int = 256) -> Tensor:
    """Chunks of tokens, computed again in the backward."""
    parts: list[Any] = [
        checkpoint(dense, hidden, problem.head, other, problem.teacher_head, use_reentrant=False)
        for hidden, other in zip(
            problem.hidden.split(rows), problem.teacher_hidden.split(rows), strict=True
        )
    ]
    return torch.stack(parts).sum() / len(problem.hidden)


PEERS: dict[str, Peer] = {
    "ours": ours,
    "TRL": trl,
    "liger, chunks of 256": liger(256),
    "liger, chunks of 1,024": liger(1024),
    "checkpointed chunks of 256": checkpointed,
    "naive": naive,
}


def page(data: Json) -> str:
    """The markdown page."""
    lines = [
        "# The reverse KL and its peers",
        "",
        f"{place(data)}, {'bfloat16' if data['device'] == 'cuda' else 'float32'}. Written by "
        "`benchmarks/reverse_kl.py`, which says how. The floor is the four matrix products alone, "
        "timed in the same process in turn with the peer; memory is the peak above the inputs, the "
        "gradients of hidden states and head included, and without them.",
    ]
    for sizes in dict.fromkeys(tuple(row["sizes"]) for row in data["rows"]):
        rows = [row for row in data["rows"] if tuple(row["sizes"]) == sizes]
        lines += ["", *table(sizes, rows, data["device"])]
    return "\n".join(lines) + "\n"


def table(sizes: Sequence[int], rows: Sequence[Json], device: str) -> list[str]:
    """Of one problem: a row a peer, and what was aimed at."""
    num_rows, hidden, vocabulary = sizes
    lines = [
        f"## N = {num_rows:,}, H = {hidden:,}, V = {vocabulary:,}",
        "",
        "| | seconds | floor | share of the floor | ours is so many times as fast | peak MiB "
        "| ours takes so much of it | without gradients | so much of it | loss | day, load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = rows[0] if rows[0]["peer"] == "ours" else None
    for row in rows:
        cells = [
            row["peer"],
            f"{row['seconds']:.3g}",
            f"{row['floor_seconds']:.3g}",
            f"{row['floor_seconds'] / row['seconds']:.2f}",
            f"{speed(row) / speed(own):.2f}" if own else "-",
            f"{row['peak_mib']:,.0f}",
            f"{own['peak_mib'] / row['peak_mib']:.2f}" if own else "-",
            f"{apart(row):,.0f}",
            f"{apart(own) / apart(row):.2f}" if own else "-",
            f"{row['loss']:.6g}",
            f"{row['date']}, {row['load']:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    aims = (
        f"aimed at: {TARGETS['share']} of the floor, {TARGETS['trl']} times TRL, "
        f"{TARGETS['liger']} times Liger, {TARGETS['memory']} of TRL's memory"
    )
    if device == "cuda":
        aims = f"aimed at: {GPU_TARGET} times TRL and Liger"
    return [*lines, "", f"Times are compared over each process's own floor; {aims}."]


def apart(row: Json) -> float:
    """Peak memory without the gradients, which every peer has to give."""
    return row["peak_mib"] - row["gradients_mib"]


def speed(row: Json) -> float:
    """Seconds over those of the floor beside it."""
    return row["seconds"] / row["floor_seconds"]


if __name__ == "__main__":
    main()
