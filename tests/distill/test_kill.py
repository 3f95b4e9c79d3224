"""A distillation killed by SIGKILL wherever it is, and resumed, is one that was never killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed import PHASES, run
from small_runs import assert_same_run, opd_stage

from distill.config import OpdStage
from posttrain.job import Job

HOME = Path(__file__).resolve().parents[2]
SEED = 0


def go_on(stage: OpdStage, job: Job, kill: tuple[str, int] | None = None) -> int | None:
    """The exit code of a process of its own that goes on with the job."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "deepspeed"])
    inputs = {name: str(path) for name, path in job.inputs.items()}
    arguments = stage.model_dump(mode="json"), str(job.out), inputs, str(job.folder), kill
    process = context.Process(target=run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [{}, {"max_staleness": 1}, {"max_staleness": 2, "partial_rollout_tokens": 2}],
    ids=["in turn", "ahead", "in parts"],
)
def test_a_run_killed_in_every_phase_comes_to_the_same_bits(
    make_job: Callable[[str], Job],
    schedule: dict[str, Any],
) -> None:
    stage, draw = opd_stage(num_steps=5, **schedule), random.Random(SEED)
    straight, killed = make_job("straight"), make_job("killed")
    assert go_on(stage, straight) == 0
    calls = json.loads(straight.out.with_suffix(".calls").read_text())
    for phase in PHASES:
        # the end is the last of its calls; the other phases are in each step that is left
        last = calls[phase] - 1 if phase == "ending" else calls[phase] // 3
        first = calls[phase] - 5 if phase == "ending" else 1
        kill = phase, draw.randint(first, last)
        assert go_on(stage, killed, kill) == -signal.SIGKILL, kill
    assert go_on(stage, killed) == 0
    assert_same(straight, killed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_killed_together_come_to_the_same_bits(
    make_job: Callable[[str], Job], strategy: str
) -> None:
    optimizer = {"name": "muon" if strategy == "ddp" else "adamw", "learning_rate": 1e-3}
    learners = {"num_ranks": 2, "strategy": strategy}
    stage = opd_stage(learners=learners, optimizer=optimizer, num_rollout_workers=1)
    straight, killed = make_job("straight"), make_job("killed")
    told: list[dict[str, Any]] = [
        {
            "stage": stage.model_dump(mode="json"),
            "out": str(job.out),
            "inputs": {role: str(path) for role, path in job.inputs.items()},
            "folder": str(job.folder),
            "num_places": 2,
        }
        for job in (straight, killed)
    ]
    assert apart([told[0], {**told[1], "dies_at": 4}]) == -signal.SIGKILL
    assert apart([told[1]]) == 0
    assert_same(straight, killed)


def apart(jobs: list[dict[str, Any]]) -> int:
    """The exit code of a driver whose roles are in Ray workers."""
    command = [sys.executable, str(HOME / "tests" / "distill" / "apart.py"), json.dumps(jobs)]
    env = {**os.environ, "PYTHONPATH": str(HOME)}
    return subprocess.run(command, env=env, check=False).returncode


def assert_same(straight: Job, killed: Job) -> None:
    """Weights, metrics and files, to the bit."""
    assert_same_run(killed, straight)
    names = [  # what a kill leaves half written, `.tmp`, goes with the stage's end
        sorted(path.name for path in j.out.iterdir() if path.suffix != ".tmp")
        for j in (straight, killed)
    ]
    assert names[0] == names[1]
