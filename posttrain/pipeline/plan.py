"""What a run would do, without doing it: its stages, which are done, and what the others cost."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import InsufficientResources
from posttrain.pipeline.cluster import num_usable_cpus
from posttrain.pipeline.costs import cost_of, estimated_seconds
from posttrain.pipeline.display import clock
from posttrain.pipeline.ledger import Ledger, run_directory
from posttrain.pipeline.recipe import ClusterConfig, Recipe
from posttrain.pipeline.schedule import Schedule, widest, workers_needed
from posttrain.pipeline.stages import Stage, build, stage_keys

START_S = 20.0
"""Starting Ray and importing torch in its workers."""


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan."""

    name: str
    state: str
    """`done`, `begun` (a partial folder is there) or `to do`."""

    tokens: int
    seconds: float
    """Work that the stage takes or took."""

    key: str


@dataclass(frozen=True)
class Plan:
    """A run's stages, in order, and the time it would take."""

    directory: str
    stages: list[PlannedStage]
    num_workers: int
    wall_s: float
    """Estimated time to the report, start-up included; 0 if all is done."""

    def json(self) -> dict[str, Any]:
        """The same facts for machines."""
        return asdict(self)

    def text(self) -> str:
        """A table with one line per stage, and a sum."""
        width = max(len(stage.name) for stage in self.stages)
        lines = [f"{'stage':{width}}  state   {'tokens':>12}  {'time':>8}"]
        lines += [
            f"{s.name:{width}}  {s.state:6}  {s.tokens or '-':>12}  {_about(s):>8}"
            for s in self.stages
        ]
        todo = [stage for stage in self.stages if stage.state != "done"]
        lines.append("")
        if not todo:
            lines.append(f"Nothing to do: all {len(self.stages)} stages are done.")
        else:
            lines.append(
                f"{len(todo)} of {len(self.stages)} stages to do, about {clock(self.wall_s)} on "
                f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}."
            )
        return "\n".join(lines)


def plan(recipe: Recipe, folder: Path, directory: Path | None = None) -> Plan:
    """What `run` would do for a recipe in `folder` with the run directory `directory`."""
    directory = run_directory(recipe.name, directory)
    stages = build(recipe, folder)
    keys = stage_keys(stages, folder, recipe.seed)
    ledger = Ledger(directory)
    done = {stage.name for stage in stages if ledger.find(stage.name, keys[stage.name])}
    seconds = estimated_seconds(stages, folder, directory)
    num_workers = wanted_workers(recipe.cluster, stages, {s.name for s in stages} - done)
    planned = [
        PlannedStage(
            name=stage.name,
            state=_state(ledger, stage, keys[stage.name], is_done=stage.name in done),
            tokens=cost_of(stage.config).tokens,
            seconds=round(seconds[stage.name], 1),
            key=keys[stage.name],
        )
        for stage in stages
    ]
    wall_s = START_S + wall_seconds(stages, done, seconds, num_workers)
    return Plan(
        directory=str(directory),
        stages=planned,
        num_workers=num_workers,
        wall_s=round(wall_s, 1) if len(done) < len(stages) else 0.0,
    )


def wanted_workers(config: ClusterConfig, stages: list[Stage], todo: set[str]) -> int:
    """Workers to ask for: what the recipe says or this machine's cores allow, if there is so much
    to do at once. A cluster elsewhere may have room for fewer.

    Raises InsufficientResources where a stage cannot run on so many.
    """
    num_workers = max(1, widest(stages, todo))
    if config.num_workers or not config.address:
        limit = config.num_workers or num_usable_cpus() // config.num_threads
        num_workers = max(1, min(limit, num_workers))
    check_workers(stages, todo, num_workers)
    return num_workers


def check_workers(stages: list[Stage], todo: set[str], num_workers: int) -> None:
    """Raise InsufficientResources where a stage that is to be done needs more workers."""
    for stage in stages:
        if stage.name in todo and stage.num_required > num_workers:
            raise InsufficientResources(
                f"stage {stage.name} needs {stage.num_required} workers for {stage.required_by}, "
                f"and the run has {num_workers}: raise cluster.num_workers to "
                f"{stage.num_required}, or change that"
            )


def wall_seconds(
    stages: list[Stage], done: set[str], seconds: dict[str, float], num_workers: int
) -> float:
    """How long the stages that are not done would take side by side, as `run` schedules them."""
    schedule = Schedule(stages, done, seconds)
    by_name = {stage.name: stage for stage in stages}
    ends: dict[str, float] = {}
    now = 0.0
    while schedule.todo or ends:
        used = sum(workers_needed(by_name[name], num_workers) for name in ends)
        stage = schedule.start_next(num_workers - used, num_workers)
        if stage:
            ends[stage.name] = now + seconds[stage.name]
            continue
        first = min(ends, key=ends.__getitem__)
        now = ends.pop(first)
        schedule.finish(first)
    return now


def _state(ledger: Ledger, stage: Stage, key: str, *, is_done: bool) -> str:
    if is_done:
        return "done"
    return "begun" if ledger.partial(stage.name, key).exists() else "to do"


def _about(stage: PlannedStage) -> str:
    return clock(stage.seconds) if stage.state == "done" else f"~{clock(stage.seconds)}"
