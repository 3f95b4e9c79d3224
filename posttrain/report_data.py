"""What a run left behind, read for the report: scores, transcripts, metrics and times by name.

Names are the report's: checkpoints `base`, `sft/<domain>`, `specialist/<domain>`, `average`,
`ties`, `mixed`, `opd`; stages likewise, evaluations as `evaluate/<checkpoint>`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.domains.overlap import told
from posttrain.errors import DataError
from posttrain.metrics import read_records

EVALUATE = "evaluate/"
METRICS = "metrics/"


@dataclass(frozen=True)
class Run:
    """Everything the report tells, as its stages wrote it."""

    scores: dict[str, dict[str, dict[str, Any]]]
    """checkpoint -> domain -> a domain's entry of scores.json."""
    transcripts: dict[str, list[dict[str, Any]]]
    """checkpoint -> the lines of samples.jsonl."""
    records: dict[str, list[dict[str, Any]]]
    """stage -> its metrics, oldest first."""
    seconds: dict[str, float]
    """stage -> wall time in seconds, evaluations included."""
    overlaps: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict[str, Any])
    """stage -> domain -> what it left out of training (posttrain/domains/overlap.py)."""

    @property
    def tokens(self) -> dict[str, int]:
        """stage -> tokens that carried loss, over all its steps; of the stages that train."""
        counted = {
            stage: sum(
                int(value or 0)
                for record in records
                for name, value in record.items()
                if name == "tokens" or name.startswith(("tokens/", "off_policy_tokens/"))
            )
            for stage, records in self.records.items()
        }
        return {stage: count for stage, count in counted.items() if count}

    @property
    def progress(self) -> dict[str, list[dict[str, float | None]]]:
        """stage -> its scores by domain and macro while it ran, and `tokens_seen` before each; None
        where no answer could be judged."""
        found: dict[str, list[dict[str, float | None]]] = {}
        for stage, records in self.records.items():
            for record in records:
                scores = {
                    name.removeprefix("score/"): value
                    for name, value in record.items()
                    if name.startswith("score/")
                }
                if scores:
                    point = {"tokens_seen": record["tokens_seen"], **scores}
                    found.setdefault(stage, []).append(point)
        return found


def read_run(inputs: Mapping[str, Path]) -> Run:
    """Read the finished stages that a report was given, by role (see ReportStage)."""
    evaluated = {role.removeprefix(EVALUATE): p for role, p in inputs.items() if is_score(role)}
    stages = {role.removeprefix(METRICS): path for role, path in inputs.items()}
    return Run(
        scores={
            name: read_json(path / "scores.json")["domains"] for name, path in evaluated.items()
        },
        transcripts={name: read_lines(path / "samples.jsonl") for name, path in evaluated.items()},
        records={
            name: read_records(path / "metrics.jsonl")
            for name, path in stages.items()
            if not is_score(name)
        },
        seconds={
            name: float(read_json(path / "done.json")["seconds"]) for name, path in stages.items()
        },
        overlaps={name: found for name, path in stages.items() if (found := told(path))},
    )


def is_score(role: str) -> bool:
    """Whether a role is an evaluation."""
    return role.startswith(EVALUATE)


def read_json(path: Path) -> Any:
    """A JSON file. Raises DataError where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): delete the stage's folder and run again"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's records; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 too
    return [json.loads(line) for line in lines if line]


def check_same_prompts(run: Run, domains: Sequence[str]) -> None:
    """Paired comparisons need one set of prompts. Raises DataError naming two that differ."""
    for domain in domains:
        first: tuple[str, list[str]] | None = None
        for name, by_domain in run.scores.items():
            if domain not in by_domain:
                continue
            ids = by_domain[domain]["prompt_ids"]
            if first is None:
                first = (name, ids)
            elif ids != first[1]:
                raise DataError(
                    f"checkpoints {first[0]!r} and {name!r} were scored on different prompts of "
                    f"domain {domain!r} ({len(first[1])} and {len(ids)}): evaluate both with one "
                    "recipe"
                )
