"""Synchronous beside asynchronous distillation: `python benchmarks/schedules.py RUN`.

RUN is a finished run's folder (posttrain run quickstart). Each schedule takes a copy of it, in
which all but the distillation is done already, and `posttrain run` distils and evaluates again.
Seconds are of the clock, since what is compared is what runs beside what: on a machine with nothing
else to do. The first step is left out, which waits for its batch whatever the schedule.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from measured import Json, machine, place, write

POSTTRAIN = (sys.executable, "-m", "posttrain")

SCHEDULES: dict[str, list[str]] = {
    "synchronous, one process": [],
    "synchronous, sampler in a process of its own": ["num_rollout_workers=1"],
    "asynchronous, one process, max_staleness 1": ["max_staleness=1"],
    "asynchronous, two processes, max_staleness 1": ["max_staleness=1", "num_rollout_workers=1"],
    "asynchronous, two processes, max_staleness 2": ["max_staleness=2", "num_rollout_workers=1"],
    "asynchronous, two processes, max_staleness 3, parts of 12 tokens": [
        "max_staleness=3",
        "num_rollout_workers=1",
        "partial_rollout_tokens=12",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--page", type=Path, default=Path("docs/schedules.md"))
    arguments = parser.parse_args()
    data: Json = {**machine("torch", "ray"), "rows": []}
    for name, settings in SCHEDULES.items():
        sys.stderr.write(f"{name} ...\n")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "run"
            shutil.copytree(arguments.run, copy)
            for stage in (copy / "stages").glob("*opd-*"):
                shutil.rmtree(stage)
            data["rows"].append({"name": name, **measure(copy, settings)})
        write(arguments.page, data, page)


def measure(run: Path, settings: list[str]) -> Json:
    """A row of the table."""
    options = [part for setting in settings for part in ("--set", f"distill.{setting}")]
    recipe = [str(run / "recipe.yaml"), "--dir", str(run), *options]
    plan = subprocess.run(
        [*POSTTRAIN, "plan", *recipe, "--json"], stdout=subprocess.PIPE, check=True
    )
    states = {stage["name"]: stage["state"] for stage in json.loads(plan.stdout)["stages"]}
    if states["base"] != "done":
        sys.exit("RUN was made by other code, so that all of it would be made again: run it anew")
    command = [*POSTTRAIN, "run", *recipe, "--plain"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    (log,) = (run / "stages").glob("opd-*/metrics.jsonl")
    steps = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    report = json.loads((run / "report.json").read_text("utf-8"))
    seconds = [step["seconds"] for step in steps]
    return {
        "steps": len(steps),
        "step_s": median(b - a for a, b in pairwise(seconds)),
        "total_s": seconds[-1],
        "kl": fmean(step["kl"] for step in steps[-10:]),
        "staleness": fmean(step["staleness"] for step in steps),
        "gap": fmean(step["sampler_gap"] for step in steps),
        "score": [report["checkpoints"]["opd"]["macro"][key] for key in ("score", "low", "high")],
    }


def page(data: Json) -> str:
    """docs/schedules.md."""
    lines = [
        "# Schedules of distillation",
        "",
        f"Written by `benchmarks/schedules.py`, which says how; {place(data)}, load "
        f"{data['load']} at the start. Staleness is in versions, the sampler's gap in nats a "
        "token, the KL that of the last ten steps; scores have 95% intervals.",
        "",
        "| schedule | s a step | s in all | staleness | gap | KL | macro score |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        mean, low, high = row["score"]
        lines.append(
            f"| {row['name']} | {row['step_s']:.2f} | {row['total_s']:.0f} "
            f"| {row['staleness']:.1f} | {row['gap']:.1e} | {row['kl']:.4f} "
            f"| {mean:.3f} [{low:.3f}, {high:.3f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
