"""The process that runs stages and hosts roles: a plain class, made a Ray actor by cluster.py.

Importing torch and transformers takes ten seconds of a core, so that a worker imports once and then
runs one stage after another. While a stage runs elsewhere, an idle worker may host its roles.
"""

import gc
import importlib
import logging
import os
import random
import shutil
import sys
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import SIBLINGS
from posttrain.config import Config
from posttrain.errors import PosttrainError
from posttrain.job import Job, RoleLost, load_attribute
from posttrain.metrics import Metrics
from posttrain.pipeline.ledger import (
    Done,
    commit,
    hash_output,
    hold,
    read_done,
    remove_leftovers,
)
from posttrain.pipeline.source import versions

ATTEMPT_WAIT_S = 30.0
"""How long a killed run's worker may take to die before its stage's folder is given up."""


@dataclass(frozen=True)
class Order:
    """One stage to run: `Order("opd", "distill.opd:work", config, {"start": .../base-1a}, ...)`."""

    stage: str
    work: str
    config: Config
    inputs: Mapping[str, Path]
    """Finished stages' folders by role."""

    input_keys: Mapping[str, str]
    key: str
    partial: Path
    folder: Path
    recipe_folder: Path
    seed: int
    num_threads: int


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: with its record, or with one of the other three."""

    done: Done | None = None
    error: PosttrainError | None = None
    """What the user can mend."""

    crash: str = ""
    """The traceback of anything else."""

    lost: str = ""
    """A role's process died: worth another attempt."""


class Worker:
    """Runs stages, one at a time, and hosts roles while it has none."""

    def __init__(self, warm: Sequence[str]) -> None:
        # Ray's processes have what they need of it by now; graders and tools must not inherit it.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        _spin_briefly()
        self._roles: dict[str, tuple[Any, int, str]] = {}
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        for package in SIBLINGS:
            logging.getLogger(package).setLevel(logging.INFO)
        for module in warm:
            with suppress(Exception):  # raised again, into the log, by the stage that needs it
                importlib.import_module(module)

    def pid(self) -> int:
        """This process: an answer means that the imports are done."""
        return os.getpid()

    def run_stage(self, order: Order, helpers: Sequence[Any]) -> Outcome:
        """Fill the stage's partial folder, going on from what is there, and commit it."""
        order.partial.mkdir(parents=True, exist_ok=True)
        log = order.partial / "log.txt"
        try:
            with hold(order.partial / "lock", wait_s=ATTEMPT_WAIT_S), logged_to(log):
                try:
                    return Outcome(done=_run(order, helpers, log))
                except (Exception, SystemExit):
                    traceback.print_exc()  # into the log; the driver gets it below
                    raise
        except PosttrainError as error:
            return Outcome(error=error)
        except RoleLost as error:
            return Outcome(lost=str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # recorded: the driver raises it
            return Outcome(crash="".join(traceback.format_exception(error)))
        finally:
            _forget()

    def host(
        self, role_id: str, path: str, kwargs: dict[str, Any], num_threads: int, log: str
    ) -> None:
        """Make the role `"module:Class"(**kwargs)`; what it prints goes to its stage's log."""
        with logged_to(Path(log)):
            make = load_attribute(path)
            _set_threads(num_threads)
            self._roles[role_id] = (make(**kwargs), num_threads, log)

    def call(self, role_id: str, method: str, args: tuple[Any, ...]) -> Any:
        """The value of a role's method."""
        role, num_threads, log = self._roles[role_id]
        with logged_to(Path(log)):
            _set_threads(num_threads)
            return getattr(role, method)(*args)

    def drop(self, role_id: str) -> None:
        """Forget a role, and free what it held."""
        self._roles.pop(role_id, None)
        _forget()


def _run(order: Order, helpers: Sequence[Any], log: Path) -> Done:
    found = read_done(order.folder, order.key)
    if found:  # a killed run's worker lived long enough to finish
        shutil.rmtree(order.partial, ignore_errors=True)
        return found
    work = load_attribute(order.work)
    _set_threads(order.num_threads)
    _seed(order.seed)
    metrics = Metrics(order.partial / "metrics.jsonl", stage=order.stage)
    place = _placement(order, helpers, log)
    try:
        work(
            order.config,
            Job(
                out=order.partial,
                inputs=order.inputs,
                folder=order.recipe_folder,
                seed=order.seed,
                num_threads=order.num_threads,
                metrics=metrics,
                place=place,
                num_places=max(1, len(helpers)),
            ),
        )
    finally:
        if place:
            place.close()
    remove_leftovers(order.partial)
    done = Done(
        stage=order.stage,
        key=order.key,
        config=order.config.model_dump(mode="json"),
        inputs=dict(order.input_keys),
        output=hash_output(order.partial),
        seconds=round(metrics.seconds, 3),
        versions=versions(),
    )
    commit(order.partial, order.folder, done)
    return done


def _placement(order: Order, helpers: Sequence[Any], log: Path) -> Any:
    if not helpers:
        return None
    from posttrain.pipeline.roles import Placement  # needs ray, as helpers do

    return Placement(helpers, num_threads=order.num_threads, log=log)


@contextmanager
def logged_to(path: Path) -> Generator[None]:
    """What this process prints goes to the end of `path`: Python's, C's and its children's output.

    The descriptors move, not sys.stderr, which a logger made meanwhile would keep for ever.
    """
    streams = (sys.stdout, 1), (sys.stderr, 2)
    with path.open("ab") as file:
        saved = [(stream, target, os.dup(target)) for stream, target in streams]
        for stream, target, _ in saved:
            stream.flush()
            os.dup2(file.fileno(), target)
        try:
            yield
        finally:
            for stream, target, before in saved:
                stream.flush()
                os.dup2(before, target)
                os.close(before)


def _spin_briefly() -> None:
    """Threads that wait for each other spin a few microseconds, then sleep.

    Spinning on, libgomp's default, made steps ten times slower on shared cores; sleeping at once
    (OMP_WAIT_POLICY=passive) 1.8 times slower on two quiet ones (0.70 s a step against 0.39 s).
    """
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's own word, which a spin count overrides
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _set_threads(num_threads: int) -> None:
    torch: Any = sys.modules.get("torch")  # a stage that did not import it needs no threads of it
    if torch is not None and torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def _seed(seed: int) -> None:
    """No stage sees what the one before it in this process left in the global generators."""
    random.seed(seed)
    for name, seeder in (("numpy.random", "seed"), ("torch", "manual_seed")):
        module: Any = sys.modules.get(name)
        if module is not None:
            getattr(module, seeder)(seed)


def _forget() -> None:
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
