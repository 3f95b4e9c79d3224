"""A finished run's report, made again from its stages: for a page changed since, or one deleted."""

import json
import tempfile
from pathlib import Path
from typing import Any

from posttrain.errors import DataError
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.pipeline.ledger import Done, Ledger
from posttrain.report import work
from posttrain.report_config import ReportStage


def rebuild_report(directory: Path) -> Path:
    """Write report.html and report.json of the run in `directory` again; the page's path.

    Raises DataError where there is no run, or its report is not done yet.
    """
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        raise DataError(
            f"{directory} holds no run (no manifest.json): give a run's folder, such as "
            "runs/quickstart"
        )
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        stages: dict[str, Any] = content["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{manifest} is no run's manifest ({error!r}): run the same recipe again to mend it"
        ) from None
    done = _done_report(directory, content)
    inputs = {
        role: directory / stages[name]["folder"]
        for role, name in stages["report"]["inputs"].items()
    }
    with tempfile.TemporaryDirectory(prefix="posttrain-") as name:
        out = Path(name)
        metrics = Metrics(out / "metrics.jsonl", stage="report")
        job = Job(out, inputs, directory, content["seed"], num_threads=1, metrics=metrics)
        work(ReportStage.model_validate(done.config), job)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        report["seconds"] = {name: entry["seconds"] for name, entry in stages.items()}
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        write_atomic(directory / "report.json", text)
        write_atomic(directory / "report.html", (out / "report.html").read_bytes())
    return directory / "report.html"


def _done_report(directory: Path, manifest: dict[str, Any]) -> Done:
    entry = manifest["stages"].get("report", {})
    done = Ledger(directory).find("report", entry["key"]) if entry else None
    if done is None:
        raise DataError(
            f"the run in {directory} has not come to its report yet: run the same recipe again, "
            f"posttrain run ... --dir {directory}"
        )
    return done
