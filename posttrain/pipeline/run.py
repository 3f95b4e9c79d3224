"""Runs a recipe: what is done already is left, the rest runs on a pool of workers, side by side.

The same call again does nothing; after a kill it goes on from each stage's last checkpoint. Ray is
started only if there is something to do, and ends with the call whatever happens.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

import posttrain
from posttrain.compiled_loops import has_numba, is_built
from posttrain.errors import StageError
from posttrain.files import write_atomic
from posttrain.pipeline.cluster import Cluster
from posttrain.pipeline.costs import (
    BYTES_PER_PARAMETER,
    estimated_seconds,
    num_judge_parameters,
    num_parameters,
)
from posttrain.pipeline.display import Display, clock
from posttrain.pipeline.gold_gate import check_golds, read
from posttrain.pipeline.ledger import Done, Ledger, run_directory
from posttrain.pipeline.plan import check_workers, wanted_workers
from posttrain.pipeline.recipe import ClusterConfig, Recipe, TrackingConfig
from posttrain.pipeline.resources import GB, check_resources
from posttrain.pipeline.schedule import Schedule, workers_needed
from posttrain.pipeline.source import versions
from posttrain.pipeline.stages import Stage, build, recipe_yaml, stage_keys
from posttrain.pipeline.tracking import Tracker
from posttrain.pipeline.worker import Order, Outcome

LOCK_WAIT_S = 8.0
"""A killed run's lock is free at once; another's that is just ending soon is."""

POLL_S = 0.5

MAX_ATTEMPTS = 2
"""A stage whose process dies is tried so often in all."""


class StageCrashed(RuntimeError):
    """A stage raised what no user can mend; the message holds its traceback."""


@dataclass(frozen=True)
class RunResult:
    """What a run did."""

    directory: Path
    ran: list[str]
    """Stages that were computed, as they finished."""

    num_stages: int
    seconds: float
    """Wall time of this call."""

    @property
    def report(self) -> Path:
        """The report page."""
        return self.directory / "report.html"


@dataclass(frozen=True)
class Work:
    """Stages to be run and where: what `run` makes of a recipe, and tests make by hand."""

    stages: list[Stage]
    keys: dict[str, str]
    recipe_folder: Path
    directory: Path
    name: str
    seed: int
    cluster: ClusterConfig
    tracking: TrackingConfig
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Estimated seconds by stage."""

    checkpoint_gb: float = 0.0
    judge_gb: float = 0.0
    """The largest judge's weights."""

    sandboxes: Mapping[str, str] = field(default_factory=dict[str, str])
    """The sandbox's level on this machine, by domain whose reward runs programs."""

    recipe: Recipe | None = None
    """Whose gold answers are graded before anything is trained; None: nobody's."""


def run(
    recipe: Recipe,
    folder: Path,
    directory: Path | None = None,
    *,
    sandboxes: Mapping[str, str] | None = None,
) -> RunResult:
    """Bring a recipe that lies in `folder` to its report in `directory` (default: runs/<name>).

    `sandboxes` are the levels that its checks found, to be told and written down.

    Raises LockedError, InsufficientResources, StageError, a stage's own PosttrainError, or
    StageCrashed; KeyboardInterrupt on Ctrl-C and SystemExit(143) on SIGTERM, with Ray shut down.
    """
    directory = run_directory(recipe.name, directory)
    stages = build(recipe, folder)
    work = Work(
        stages=stages,
        keys=stage_keys(stages, folder, recipe.seed),
        recipe_folder=folder.resolve(),
        directory=directory,
        name=recipe.name,
        seed=recipe.seed,
        cluster=recipe.cluster,
        tracking=recipe.tracking,
        seconds=estimated_seconds(stages, folder, directory),
        checkpoint_gb=num_parameters(stages, folder) * BYTES_PER_PARAMETER / GB,
        judge_gb=num_judge_parameters(recipe, stages, folder) * BYTES_PER_PARAMETER / GB,
        sandboxes=sandboxes or {},
        recipe=recipe,
    )
    return run_work(work, recipe_yaml(recipe))


def run_work(work: Work, resolved_recipe: str = "") -> RunResult:
    """Run what is not done of `work`; see `run`."""
    start = time.monotonic()
    console = Console(stderr=True)
    ledger = Ledger(work.directory)
    with ledger.held(LOCK_WAIT_S):
        done = {s.name: ledger.find(s.name, work.keys[s.name]) for s in work.stages}
        todo = [stage.name for stage in work.stages if done[stage.name] is None]
        write_atomic(work.directory / "recipe.yaml", resolved_recipe)
        write_manifest(work, ledger)
        ran: list[str] = []
        if todo and work.recipe:
            _check_golds(work, work.recipe, console, set(todo))
        if todo:
            ran = _run_todo(work, ledger, console, set(todo))
        publish(work, ledger)
    seconds = time.monotonic() - start
    count = len(work.stages)
    text = f"ran {len(ran)} of {count} stages" if ran else f"nothing to do: {count} stages are done"
    console.print(
        f"{text} in {work.directory} ({clock(seconds)})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return RunResult(work.directory, ran, count, seconds)


def _check_golds(work: Work, recipe: Recipe, console: Console, todo: set[str]) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    stages = [stage for stage in work.stages if stage.name in todo]
    with interruptible():
        check_golds(recipe, work.recipe_folder, work.directory, stages, say)


def _run_todo(work: Work, ledger: Ledger, console: Console, todo: set[str]) -> list[str]:
    num_workers = wanted_workers(work.cluster, work.stages, todo)
    check_resources(
        work.directory,
        num_workers=num_workers,
        num_checkpoints=len(todo),
        checkpoint_gb=work.checkpoint_gb,
        judge_gb=work.judge_gb,
    )
    tracker = Tracker(work.tracking, group=work.name, directory=work.directory / "wandb")
    display = Display(console, len(work.stages), len(work.stages) - len(todo))
    count = f"{num_workers} worker{'s' if num_workers > 1 else ''}"
    for name, level in work.sandboxes.items():
        display.say(f"the programs of domain {name} run in the sandbox at the level {level}")
    display.say(f"{len(todo)} of {len(work.stages)} stages to do; starting {count}")
    warm = sorted({stage.work.partition(":")[0] for stage in work.stages if stage.name in todo})
    if work.cluster.address is None and not work.cluster.gpus_per_job and has_numba():
        is_built()  # says so here if it has to compile: a stage would say it in its log alone
    cluster = Cluster(work.cluster, num_workers, warm)
    # twice: Ray's start puts a handler of its own in place of the first
    with interruptible(), cluster, interruptible(), display:
        check_workers(work.stages, todo, len(cluster.workers))  # a cluster elsewhere may be small
        try:
            return _Driver(work, ledger, cluster, display, tracker, todo).drive()
        finally:
            tracker.close()


class _Driver:
    """Keeps the workers busy until everything is done or something fails."""

    def __init__(
        self,
        work: Work,
        ledger: Ledger,
        cluster: Cluster,
        display: Display,
        tracker: Tracker,
        todo: set[str],
    ) -> None:
        self.work = work
        self.ledger = ledger
        self.cluster = cluster
        self.display = display
        self.tracker = tracker
        self.stages = {stage.name: stage for stage in work.stages}
        self.schedule = Schedule(work.stages, set(self.stages) - todo, work.seconds)
        self.free = list(cluster.workers)
        self.taken: dict[str, list[str]] = {}
        """Workers of each stage at work: its own first, then its helpers and those kept idle."""

        self.attempts: dict[str, int] = {}
        self.heard: dict[str, tuple[float, float]] = {}
        """By stage: when it was last heard of, and the newest change in its folder then."""

        self.ran: list[str] = []

    def drive(self) -> list[str]:
        """Run all that is to be done; the names in order of finishing."""
        while self.schedule.todo or self.schedule.running:
            self._start_stages()
            for name, outcome in self.cluster.finished(POLL_S).items():
                self._take(name, outcome)
            for name in self.schedule.running:
                self._check_silence(name)
                self.tracker.forward(name, self._partial(name))
            self.display.refresh()
        return self.ran

    def _start_stages(self) -> None:
        num_workers = len(self.cluster.workers)
        while stage := self.schedule.start_next(len(self.free), num_workers):
            num_taken = workers_needed(stage, num_workers)
            names, self.free = self.free[:num_taken], self.free[num_taken:]
            self.taken[stage.name] = names
            order = self._order(stage)
            self.display.start(stage.name, order.partial)
            config = stage.config.model_dump(mode="json")
            self.tracker.start(stage.name, order.key, order.partial, config)
            self.heard[stage.name] = (time.monotonic(), 0.0)
            self.cluster.submit(order, names[0], names[1 : 1 + stage.num_helpers])
        assert self.taken, "stages are left, and none of them can start"

    def _order(self, stage: Stage) -> Order:
        keys = self.work.keys
        return Order(
            stage=stage.name,
            work=stage.work,
            config=stage.config,
            inputs={role: self._folder(name) for role, name in stage.inputs.items()},
            input_keys={role: keys[name] for role, name in stage.inputs.items()},
            key=keys[stage.name],
            partial=self._partial(stage.name),
            folder=self._folder(stage.name),
            recipe_folder=self.work.recipe_folder,
            seed=self.work.seed,
            num_threads=stage.num_threads,
        )

    def _take(self, name: str, outcome: Outcome) -> None:
        """Note a stage's end. Raises what ends the run."""
        if outcome.done:
            self.free += self.taken.pop(name)
            self.schedule.finish(name)
            self.ran.append(name)
            folder = self._folder(name)
            self.display.finish(name, outcome.done.seconds, folder)
            self.tracker.finish(name, folder)
            self.ledger.remove_stale_partials(name)
            write_manifest(self.work, self.ledger)
            return
        self.display.drop(name)
        log = self._partial(name) / "log.txt"
        if outcome.error:
            raise outcome.error
        if outcome.crash:
            raise StageCrashed(f"stage {name} failed; its log is {log}\n\n{outcome.crash}")
        self.attempts[name] = self.attempts.get(name, 0) + 1
        reason = outcome.lost.splitlines()[0] if outcome.lost else "its process died"
        if self.attempts[name] >= MAX_ATTEMPTS:
            raise StageError(
                f"the process of stage {name} died {self.attempts[name]} times, as it does when "
                f"memory runs out: read {log}, and lower cluster.num_workers or the stage's rows "
                f"in memory. {outcome.lost}"
            )
        self.display.say(f"  again    {name}  in a new process ({reason})")
        self.tracker.finish(name, self._partial(name))
        self.free += self.cluster.replace(self.taken.pop(name))
        self.schedule.put_back(name)

    def _check_silence(self, name: str) -> None:
        """Raise StageError if nothing in the stage's folder has changed for cluster.timeout_s."""
        now = time.monotonic()
        heard_at, before = self.heard[name]
        newest = _newest_change(self._partial(name))
        if newest != before:
            self.heard[name] = (now, newest)
        elif now - heard_at > self.work.cluster.timeout_s:
            raise StageError(
                f"stage {name} wrote nothing for {self.work.cluster.timeout_s:g} s "
                f"(cluster.timeout_s): read {self._partial(name) / 'log.txt'}, and raise the "
                "limit if the stage is only slow"
            )

    def _folder(self, name: str) -> Path:
        return self.ledger.folder(name, self.work.keys[name])

    def _partial(self, name: str) -> Path:
        return self.ledger.partial(name, self.work.keys[name])


def publish(work: Work, ledger: Ledger) -> None:
    """Put the finished report into the run directory, with the seconds of every stage and what the
    check of gold answers found."""
    if "report" not in work.keys:
        return
    folder = ledger.folder("report", work.keys["report"])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found = {stage.name: ledger.find(stage.name, work.keys[stage.name]) for stage in work.stages}
    report["seconds"] = {name: done.seconds for name, done in found.items() if done}
    report["gold"] = {name: of["facts"] for name, of in read(work.directory).items()}
    write_atomic(
        work.directory / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    )
    write_atomic(work.directory / "report.html", (folder / "report.html").read_bytes())


def write_manifest(work: Work, ledger: Ledger) -> None:
    """What the run directory holds for this recipe: every stage's key, folder, state and hash."""
    stages: dict[str, Any] = {}
    for stage in work.stages:
        key = work.keys[stage.name]
        done: Done | None = ledger.find(stage.name, key)
        folder = ledger.folder(stage.name, key)
        stages[stage.name] = {
            "key": key,
            "folder": str(folder.relative_to(work.directory)),
            "state": "done" if done else "to do",
            "inputs": dict(stage.inputs),
            "output": done.output if done else None,
            "seconds": done.seconds if done else None,
        }
    mine = {"posttrain": posttrain.__version__, "python": sys.version.split()[0]}
    ledger.write_manifest(
        {
            "name": work.name,
            "seed": work.seed,
            "sandboxes": dict(work.sandboxes),
            "versions": {**versions(), **mine},
            "stages": stages,
        }
    )


@contextmanager
def interruptible() -> Generator[None]:
    """SIGTERM ends the run as Ctrl-C does, by SystemExit(143)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _newest_change(folder: Path) -> float:
    newest = 0.0
    with suppress(FileNotFoundError):  # a folder that moved meanwhile: the stage is done
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):  # replaced or removed meanwhile
                newest = max(newest, path.stat().st_mtime)
    return newest
