"""A distillation in a process that ends itself by SIGKILL, after a given number of calls."""

import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from distill.config import OpdStage
from distill.opd import work
from posttrain.job import Job
from posttrain.metrics import Metrics

PHASES: dict[str, tuple[str, ...]] = {
    "sampling": ("posttrain/rollout/engine.py", "posttrain/rollout/journal.py"),
    "scoring": ("distill/teachers.py", "distill/hidden_store.py"),
    "learning": ("distill/learner.py", "torch/optim/adamw.py", "distill/guard.py"),
    "saving": ("distill/resume.py", "torch/serialization.py", "distill/kept_rollouts.py"),
    "ending": ("posttrain/checkpoints.py", "safetensors/torch.py"),
}
"""Where calls count for a phase."""


@cache
def phase_of(file: str) -> str | None:
    return next((phase for phase, files in PHASES.items() if file.endswith(files)), None)


def run(
    stage: Mapping[str, Any],
    out: str,
    inputs: Mapping[str, str],
    folder: str,
    kill: tuple[str, int] | None,
) -> None:
    """Go on with a run, until there were so many calls of a phase. One that comes to its end leaves
    the number of calls in `out`.calls."""
    torch.set_num_threads(1)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, *_: Any) -> None:
        if phase := phase_of(frame.f_code.co_filename):
            calls[phase] += 1
            if (phase, calls[phase]) == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    Path(out).mkdir(exist_ok=True)
    metrics = Metrics(Path(out) / "metrics.jsonl", stage="opd")
    places = {role: Path(path) for role, path in inputs.items()}
    job = Job(Path(out), places, Path(folder), seed=0, num_threads=1, metrics=metrics)
    threading.settrace(count)  # of threads to come
    sys.settrace(count)
    work(OpdStage.model_validate(stage), job)
    sys.settrace(None)
    Path(f"{out}.calls").write_text(json.dumps(calls))
