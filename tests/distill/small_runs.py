"""Distillations at the smallest size: their stage, how one dies, and what one came to."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import OpdStage
from distill.opd import work
from posttrain.checkpoints import load_model
from posttrain.job import Job
from posttrain.metrics import Metrics

DOMAINS: tuple[str, ...] = ("mathematics", "code")


def opd_stage(*, teachers: Mapping[str, Any] | None = None, **distill: Any) -> OpdStage:
    """Two domains, four steps of six prompts, and what is given of `distill`."""
    return OpdStage.model_validate(
        {
            "domains": [
                {
                    "name": domain,
                    "data": {"jsonl": f"{domain}.jsonl"},
                    "reward": "exact",
                    "max_new_tokens": 4,
                }
                for domain in DOMAINS
            ],
            "distill": {
                "num_steps": 4,
                "prompts_per_step": 6,
                "num_slots": 4,
                "rows_per_microbatch": 4,
                "checkpoint_every": 2,
                "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "schedule": "linear"},
                **distill,
            },
            "teachers": teachers or {domain: f"specialist/{domain}" for domain in DOMAINS},
        }
    )


class KilledAt(Metrics):
    """Metrics of a run that dies when it would log a step."""

    def __init__(self, path: Path, *, step: int) -> None:
        super().__init__(path, stage="opd")
        self.step = step

    def log(self, step: int, total: int, **values: float | int | str) -> None:
        """Dies, or logs."""
        if step == self.step:
            raise KeyboardInterrupt
        super().log(step, total, **values)


def work_until(stage: OpdStage, job: Job, step: int) -> None:
    """Distil until the step would be logged, and die there."""
    with pytest.raises(KeyboardInterrupt):
        work(stage, replace(job, metrics=KilledAt(job.metrics.path, step=step)))


def weights(job: Job) -> dict[str, torch.Tensor]:
    """The student that a run ended with."""
    return load_model(job.out / "checkpoint").state_dict()


def without_time(job: Job) -> list[dict[str, Any]]:
    """What a run logged, but for the seconds."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in job.metrics.records()]


def assert_same_weights(found: Job, wanted: Job) -> None:
    """To the bit."""
    tensors = weights(wanted)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights(found).items())


def assert_same_run(found: Job, wanted: Job) -> None:
    """Weights and metrics, to the bit."""
    assert without_time(found) == without_time(wanted)
    assert_same_weights(found, wanted)
