"""Distillations whose roles live in Ray workers: `python apart.py JOBS`, JSON of [job, ...].

Each job has `stage`, `out`, `inputs` and `folder`, and the number of processes for its roles. Where
it has `dies_at` the whole process is killed when it would log that step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from posttrain.pipeline.cluster import Cluster
from posttrain.pipeline.recipe import ClusterConfig


def main(jobs: list[dict[str, Any]]) -> None:
    """Run them, one after another."""
    num_workers = max(job["num_places"] for job in jobs)
    with Cluster(ClusterConfig(num_workers=num_workers), num_workers, ["distill.opd"]) as cluster:
        from distill.config import OpdStage  # ray starts first
        from distill.opd import work
        from posttrain.job import Job
        from posttrain.metrics import Metrics
        from posttrain.pipeline.roles import Placement

        class Mortal(Metrics):
            dies_at: int | None = None

            def log(self, step: int, total: int, **values: float | int | str) -> None:
                if step == self.dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                super().log(step, total, **values)

        for job in jobs:
            out = Path(job["out"])
            helpers = list(cluster.workers.values())[: job["num_places"]]
            metrics = Mortal(out / "metrics.jsonl", stage="opd")
            metrics.dies_at = job.get("dies_at")
            place = Placement(helpers, num_threads=1, log=out / "log.txt")
            work(
                OpdStage.model_validate(job["stage"]),
                Job(
                    out,
                    {role: Path(path) for role, path in job["inputs"].items()},
                    Path(job["folder"]),
                    seed=0,
                    num_threads=1,
                    metrics=metrics,
                    place=place,
                ),
            )
            place.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
