"""The last stage: a run's numbers as report.json, and as report.html, one page without a link out.

report.json holds `checkpoints`, `headroom` and `seconds`, and besides `tokens` (those with loss, by
stage), `progress` (scores while a stage ran), `headroom_intervals`, `differences`, `failures`,
`left_out` (of training: prompts near a test's), `samples`, `verdict` and `versions`. Both files say
the same.
"""

import json
import platform
from importlib import metadata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.report_config import ReportStage
from posttrain.report_data import Run, read_run
from posttrain.report_numbers import Numbers, compute_numbers
from posttrain.report_page import (
    curves,
    difference_table,
    failures_of,
    left_out,
    sample_cards,
    score_bars,
    score_table,
    time_bars,
)
from posttrain.report_words import duration, early_stops, verdict

PACKAGES = ("posttrain", "torch", "transformers", "trl", "accelerate", "ray", "numpy")


def work(stage: ReportStage, job: Job) -> None:
    """Write report.json and report.html from the stages in `job.inputs` (roles: see ReportStage).

    Raises DataError where a file is missing or checkpoints were scored on different prompts.
    """
    run = read_run(job.inputs)
    numbers = compute_numbers(
        run,
        stage.domains,
        oracle=stage.oracle,
        num_resamples=stage.num_resamples,
        seed=stage.seed,
    )
    facts = to_json(stage, run, numbers)
    write_atomic(job.out / "report.json", json.dumps(facts, indent=1, ensure_ascii=False))
    write_atomic(job.out / "report.html", render(stage, run, numbers))


def to_json(stage: ReportStage, run: Run, numbers: Numbers) -> dict[str, Any]:
    """What report.json holds."""
    return {
        "name": stage.name,
        "verdict": " ".join(sentences(stage, run, numbers)),
        "checkpoints": numbers.checkpoints,
        "headroom": numbers.headroom,
        "headroom_intervals": numbers.headroom_intervals,
        "differences": numbers.differences,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "progress": run.progress,
        "failures": failures_of(run),
        "left_out": left_out(run),
        "samples": run.transcripts,
        "versions": versions(),
    }


def render(stage: ReportStage, run: Run, numbers: Numbers) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("posttrain", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        name=stage.name,
        verdict=sentences(stage, run, numbers),
        domains=stage.domains,
        table=score_table(numbers, stage.domains),
        bars=score_bars(numbers, stage.domains),
        differences=difference_table(numbers, stage.domains),
        curves=curves(run, stage.domains),
        samples=sample_cards(run, stage.domains, stage.oracle),
        times=time_bars(run),
        total_time=duration(sum(run.seconds.values())),
        failures=failures_of(run),
        left_out=left_out(run),
        recipe=stage.recipe,
        versions=versions(),
    )


def sentences(stage: ReportStage, run: Run, numbers: Numbers) -> list[str]:
    """The run in words."""
    return [*verdict(numbers, stage.domains), *early_stops(run.records)]


def versions() -> dict[str, str]:
    """The interpreter and the packages that a result depends on, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree on the path, not installed
            continue
    return found
