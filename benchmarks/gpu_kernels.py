"""The Triton kernels and whole steps on a GPU, in one run: `python benchmarks/gpu_kernels.py`.

Writes docs/backbone-gpu.md and the .json beside it, anew after each part. A part is a process of
its own with a limit of time, so that what fails or hangs costs its own rows alone, and is named on
the page; the whole ends within eight minutes. Needs a GPU, torch, triton and transformers; where
the package is not installed, PYTHONPATH=. in the checkout; pytest for the tests.

kernels     each against its torch reference: the error (the norm of the difference over the
            reference's) at small odd sizes in float32 and at V4-Flash's sizes in its dtypes, then
            milliseconds and peak memory at the latter
steps       forward + backward and a decode step: with kernels, without, stock transformers
tests       tests/backbone/kernels on the device

Times are medians of synchronised calls; memory is the peak above what was held before the call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gpu_rows
import gpu_steps
import torch
from measured import Json, machine, place, write

from posttrain.backbone import kernels

TOTAL_S = 450
"""The whole run's, of which each part has at most its limit below."""
KERNELS = {"attention": 75, "indexer": 60, "mhc": 60, "mxfp4": 45}
STEPS = {"tiny": 45, "long": 60, "flash": 75, "decode": 45}
TESTS = {"tests": 150}
CALLS_S = 2.0
"""For the calls of one measurement, after the first two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/backbone-gpu.md"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        for found in work(arguments.worker, torch.device("cuda")):
            print(json.dumps(found), flush=True)  # noqa: T201  # what the parent reads
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA device: on CPU the kernels' tests run by triton's interpreter")
    everything({**KERNELS, **TESTS, **STEPS}, arguments.page)


def everything(limits: dict[str, int], page_path: Path) -> None:
    """All parts, one after the other; page and json are whole after each."""
    end, data = time.monotonic() + TOTAL_S, blank()
    for part, limit in limits.items():
        started = time.monotonic()
        limit_s = min(limit, end - started)
        if limit_s < 5:
            data["failures"].append(f"{part}: not begun, the run's {TOTAL_S} s were over")
            write(page_path, data, page)
            continue
        rows, failure = run_part(command_of(part), limit_s)
        data["rows"] += [{"part": part, **row} for row in rows]
        data["failures"] += [f"{part}: {failure}"] if failure else []
        data["seconds"][part] = round(time.monotonic() - started, 1)
        write(page_path, data, page)


def command_of(part: str) -> list[str]:
    if part in TESTS:
        folder = "tests/backbone/kernels"
        options = ("-q", "--tb=line", "-W", "default", "-p", "no:cacheprovider", "-o", "addopts=")
        return [sys.executable, "-m", "pytest", *options, "--import-mode=importlib", folder]
    return [sys.executable, __file__, "--worker", part]


def run_part(command: Sequence[str], limit_s: float) -> tuple[list[Json], str]:
    """The rows that a process printed, and how it failed, "" if it did not. Of what prints no
    rows, such as pytest, the last line is one row."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=limit_s, env=environment, check=False
        )
        out, errors = done.stdout, done.stderr
        failure = f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        out, errors = late.stdout or b"", late.stderr or b""
        failure = f"stopped after {limit_s:.0f} s"
    lines = out.decode(errors="replace").split("\n")
    rows: list[Json] = [json.loads(line) for line in lines if line.startswith('{"name"')]
    said = [line for line in lines if line.strip() and not line.startswith("{")]
    rows += [{"name": "tests", "said": said[-1]}] if said and not rows else []
    last = [line for line in errors.decode(errors="replace").split("\n") if line.strip()][-1:]
    return rows, "; ".join([failure, *last]) if failure else ""


def blank() -> Json:
    """What the numbers depend on, and room for them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found = machine("torch", "triton", "transformers")
    return {**found, "device": device, "rows": [], "failures": [], "seconds": {}}


def work(part: str, device: torch.device) -> Iterator[Json]:
    """The rows of one part; one that fails says so in its place."""
    torch.manual_seed(0)
    if part in STEPS:
        for step in gpu_steps.steps(part):
            yield from recorded(step.name, lambda step=step: measure_step(step, device))
        return
    both = (gpu_rows.rows(part, size, device) for size in (gpu_rows.SMALL, gpu_rows.Sizes()))
    for small, full in zip(*both, strict=True):
        yield from recorded(full.name, lambda small=small, full=full: measure(small, full, device))


def recorded(name: str, measured: Callable[[], Json]) -> Iterator[Json]:
    try:
        yield {"name": name, **measured()}
    except Exception as error:  # noqa: BLE001  # a GPU's errors are of every kind: the page says it
        yield {"name": name, "failure": said(error)}


def said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def measure(small: gpu_rows.Row, full: gpu_rows.Row, device: torch.device) -> Json:
    """Errors at both sizes, then time and memory at the full ones."""
    found: Json = {"shape": full.shape, "small_error": error(small), "error": error(full)}
    for name, run in (("torch", full.reference), ("kernel", full.kernel)):
        with without_kernels(name == "torch"):
            found[f"{name}_ms"], found[f"{name}_mib"] = timed(run, device)
    return found


def measure_step(step: gpu_steps.Step, device: torch.device) -> Json:
    """Time, memory and loss of each variant: {"kernels_ms": .., "stock_loss": ..}."""
    found: Json = {"shape": step.shape}
    for name, make in step.variants(device):
        with without_kernels(name == "torch"):
            try:
                run = make()
                found[f"{name}_loss"] = run()
                found[f"{name}_ms"], found[f"{name}_mib"] = timed(run, device)
            except Exception as error:  # noqa: BLE001  # the other variants are measured all the same
                found[f"{name}_failure"] = said(error)
    return found


def error(row: gpu_rows.Row) -> float:
    with without_kernels():
        wanted = row.reference()
    pairs = zip(row.kernel(), wanted, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


@contextmanager
def without_kernels(wanted: bool = True) -> Iterator[None]:
    """The backbone's own functions take the torch path, as if triton were not installed."""
    has_triton = kernels._has_triton
    if wanted:
        kernels._has_triton = lambda: False
    try:
        yield
    finally:
        kernels._has_triton = has_triton


def timed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds a call, and MiB above what was held before it."""
    function()
    synchronise(device)
    is_cuda = device.type == "cuda"
    base = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    function()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated() - base if is_cuda else 0
    seconds: list[float] = []
    end = time.perf_counter() + CALLS_S
    while not seconds or (time.perf_counter() < end and len(seconds) < 20):
        start = time.perf_counter()
        function()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), peak / 2**20


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def page(data: Json) -> str:
    """The markdown page: where it was measured, tables, tests, and what failed."""
    good = [row for row in data["rows"] if "failure" not in row]
    lines = [
        "# The backbone on a GPU",
        "",
        f"{data['device']}, {place(data)}. Written by `benchmarks/gpu_kernels.py`,",
        "which says how.",
        "",
        "| kernel | shape | error, small | error | torch ms | kernel ms | ratio | torch MiB "
        "| kernel MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *(kernel_line(row) for row in good if row["part"] in KERNELS),
        "",
        "| step | shape | stock ms | torch ms | kernels ms | stock / kernels | stock MiB "
        "| torch MiB | kernels MiB | loss: stock, torch, kernels |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(step_line(row) for row in good if row["part"] in STEPS),
        "",
        *(f"Kernels' tests: {row['said']}." for row in good if row["part"] in TESTS),
    ]
    failed = [
        f"{row['name']}, {key}: {text}"
        for row in data["rows"]
        for key, text in row.items()
        if key.endswith("failure")
    ]
    failed += data["failures"]
    lines += ["", "Failed:", "", *(f"- {one}" for one in failed)] if failed else []
    return "\n".join(lines) + "\n"


def kernel_line(row: Json) -> str:
    return (
        f"| {row['name']} | {row['shape']} | {row['small_error']:.1e} | {row['error']:.1e} | "
        f"{row['torch_ms']:.3f} | {row['kernel_ms']:.3f} | {row['torch_ms'] / row['kernel_ms']:.2f}"
        f" | {row['torch_mib']:.0f} | {row['kernel_mib']:.0f} |"
    )


def step_line(row: Json) -> str:
    names = ("stock", "torch", "kernels")

    def cells(of: str, form: str) -> list[str]:
        return [format(row[f"{n}_{of}"], form) if f"{n}_{of}" in row else "-" for n in names]

    ratio = "-"
    if "stock_ms" in row and "kernels_ms" in row:
        ratio = f"{row['stock_ms'] / row['kernels_ms']:.2f}"
    losses = ", ".join(cells("loss", ".4f"))
    columns = [*cells("ms", ".2f"), ratio, *cells("mib", ".0f"), losses]
    return f"| {row['name']} | {row['shape']} | {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
