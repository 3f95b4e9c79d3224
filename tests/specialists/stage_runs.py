"""Runs of a stage: what they log, and that a killed one comes to what a straight one does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from posttrain.checkpoints import weights_hash
from posttrain.job import Job
from posttrain.metrics import Metrics

TIMING = ("seconds", "sampling_s", "scoring_s")


def trained(job: Job) -> list[dict[str, Any]]:
    """The records of the steps, without their times."""
    records = [record for record in job.metrics.records() if record["step"] > 0]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def check_killed(
    work: Callable[[Job], None],
    new_job: Callable[..., Job],
    cut_after: Callable[[Path, int], Metrics],
    *,
    start: Path,
    last: int,
    between: Callable[[Job], None] = lambda job: None,
) -> tuple[Job, Job]:
    """Cuts a run when it logs the first step after `last`, lets `between` see it, and goes on: to
    the same records and bits as a run that was not cut. Returns the latter and the former."""
    straight, killed = new_job("straight", {"start": start}), new_job("killed", {"start": start})
    work(straight)
    with pytest.raises(KeyboardInterrupt):
        work(new_job("killed", {"start": start}, metrics=cut_after(killed.out, last)))
    between(killed)
    work(killed)
    assert trained(killed) == trained(straight)
    assert weights_hash(killed.out / "checkpoint") == weights_hash(straight.out / "checkpoint")
    return straight, killed


def gradient_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class GradientCopy(TrainerCallback):
    """Keeps the gradient that the optimizer is about to take."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradient = gradient_of(model)
