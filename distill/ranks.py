"""Several learner ranks as one learner: the first in the stage's own process, the others as roles.

    rows ──> dealt out by teachers and length ──> every rank: the same step ──> the same weights

The rows travel as references to the hidden store where it can be seen; heads are read from the
teachers' files by each rank. Where ranks hold parts of the student, the whole of it, which answers
the prompts, is gathered after each step.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.batch import ScoredExample
from distill.config import OpdStage
from distill.guard import Guard
from distill.hidden_store import HiddenRow
from distill.learner import Learner
from distill.mesh import Mesh, leave, meet
from distill.reverse_kl import Head
from distill.teacher_models import Loader
from distill.teachers import Teachers, read_head
from posttrain.checkpoints import load_model
from posttrain.errors import InsufficientResources, StageError
from posttrain.job import Job, RoleHandle
from posttrain.optim import build_optimizer

ENDING_S = 10.0
"""How long the others are asked why they ended, once a rank has waited for them in vain."""


def make_learner(
    stage: OpdStage, model: Any, head: Callable[[str], Tensor | Head], mesh: Mesh
) -> Learner:
    """The learner a stage asks for; it trains `model` in place."""
    config, optimizer = stage.distill, stage.distill.optimizer
    return Learner(
        model,
        partial(
            build_optimizer,
            name=optimizer.name,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
        ),
        mesh=mesh,
        shares=stage.shares,
        head=head,
        denominator=config.denominator,
        divergence=config.divergence.kind,
        beta=config.divergence.beta,
        top_k=config.divergence.top_k,
        temperature=config.temperature,
        rows_per_microbatch=config.rows_per_microbatch,
        tokens_per_microbatch=config.tokens_per_microbatch,
        max_grad_norm=optimizer.max_grad_norm,
        guard=Guard(spike_factor=config.guard.spike_factor, max_skipped=config.guard.max_skipped),
    )


class Rank:
    """One of the others: `Rank(stage, "runs/a/stages/base-1a/checkpoint", rank=1, meeting=...)`."""

    def __init__(self, stage: OpdStage, start: Path, *, rank: int, meeting: Path) -> None:
        self._stage, self._start, self._rank, self._meeting = stage, start, rank, meeting
        self._folders: dict[str, Path] = {}
        self._loader = Loader(dtype=torch.float32, device="cpu")

    def join(self) -> None:
        """Meet the others, and load the student."""
        mesh = join(self._stage, self._rank, self._meeting)
        model = load_model(self._start)
        self._learner = make_learner(self._stage, model, self._read_head, mesh)

    def step(self, rows: Sequence[ScoredExample], rate: float, folders: Mapping[str, Path]) -> None:
        """This rank's part of one update; `folders` says where teachers lie."""
        self._folders.update(folders)
        check_readable(rows)
        self._learner.step(rows, learning_rate_factor=rate)

    def weigh(self, shares: Mapping[str, float]) -> None:
        """As `Learner.weigh`."""
        self._learner.weigh(shares)

    def gather(self, what: str) -> None:
        """Take part in the learner's `weights` or `state`, which the first rank keeps."""
        getattr(self._learner, what)()

    def load(self, path: Path, with_guard: bool) -> None:
        """Go on from a step checkpoint."""
        self._learner.load(path, with_guard=with_guard)

    def leave(self) -> None:
        """The run is over."""
        leave()

    def _read_head(self, name: str) -> Head:
        return read_head(self._loader, self._folders[name])


def join(stage: OpdStage, rank: int, meeting: Path) -> Mesh:
    """Wait for all ranks of the stage; this one's mesh."""
    learners = stage.distill.learners
    num_ranks = learners.num_ranks
    meet(meeting, rank=rank, num_ranks=num_ranks, timeout_s=learners.timeout_s)
    shared_out = learners.vocab_parallel
    return Mesh(learners.strategy, num_ranks=num_ranks, vocab_parallel=shared_out)


def check_readable(rows: Sequence[ScoredExample]) -> None:
    """Raise StageError where hidden states lie in another machine's memory."""
    for row in rows[:1]:
        for hidden in row.teacher_hidden.values():
            if isinstance(hidden, HiddenRow) and not Path(hidden.path).exists():
                raise StageError(
                    f"a learner rank cannot see {hidden.path}: for learners on several machines "
                    "set distill.hidden_memory_gb to 0, and put the run on storage they share"
                )


def hire_learners(
    stage: OpdStage, job: Job, start: Path, model: Any, teachers: Teachers
) -> "Learners":
    """The stage's learners, met. Raises InsufficientResources where there are too few processes."""
    learners = stage.distill.learners
    if learners.num_ranks == 1:
        own = make_learner(stage, model, teachers.head, Mesh())
        return Learners(own, [], model, teachers, timeout_s=learners.timeout_s)
    if job.place is None or job.num_places < learners.num_ranks - 1:
        found = 1 if job.place is None else 1 + job.num_places
        raise InsufficientResources(
            f"distill.learners.num_ranks is {learners.num_ranks}, and the run has {found} "
            "worker(s), each of which is one rank: raise cluster.num_workers, or lower num_ranks"
        )
    meeting = job.out.resolve() / f"learners-{secrets.token_hex(4)}.tmp"
    others = [
        job.role(
            "distill.ranks:Rank", {"stage": stage, "start": start, "rank": rank, "meeting": meeting}
        )
        for rank in range(1, learners.num_ranks)
    ]
    joining = [other.call("join") for other in others]
    mesh = join(stage, 0, meeting)
    trained = load_model(start) if mesh.is_sharded else model
    own = make_learner(stage, trained, teachers.head, mesh)
    for future in joining:
        future.result(learners.timeout_s)
    return Learners(own, others, model, teachers, timeout_s=learners.timeout_s)


class Learners:
    """All ranks as one learner. `model` has the trained weights after each call."""

    def __init__(
        self,
        own: Learner,
        others: Sequence[RoleHandle],
        model: Any,
        teachers: Teachers,
        *,
        timeout_s: float,
    ) -> None:
        self._own, self._others, self._model = own, list(others), model
        self._teachers, self._timeout_s = teachers, timeout_s

    @property
    def guard(self) -> Guard:
        """The first rank's; all of them judge the same norms."""
        return self._own.guard

    def weigh(self, shares: Mapping[str, float]) -> None:
        """As `Learner.weigh`, on all ranks."""
        calls = [("weigh", shares)] * len(self._others)
        self._together(calls, lambda: self._own.weigh(shares))

    def step(
        self, rows: Sequence[ScoredExample], *, learning_rate_factor: float = 1.0
    ) -> dict[str, Tensor]:
        """One update on all rows, at least one."""
        first, *parts = deal(rows, 1 + len(self._others))
        calls = [("step", part, learning_rate_factor, self._teachers.folders) for part in parts]
        metrics = self._together(
            calls, lambda: self._own.step(first, learning_rate_factor=learning_rate_factor)
        )
        self._refresh()
        return metrics

    def state(self) -> dict[str, Any]:
        """As `Learner.state`."""
        return self._gather("state", self._own.state)

    def load(self, path: Path, *, with_guard: bool) -> dict[str, Any]:
        """As `Learner.load`."""
        state = self._together(
            [("load", path, with_guard)] * len(self._others),
            lambda: self._own.load(path, with_guard=with_guard),
        )
        self._refresh()
        return state

    def close(self) -> None:
        """The run is over."""
        if self._others:
            self._together([("leave",)] * len(self._others), leave)

    def _refresh(self) -> None:
        if self._own.mesh.is_sharded:
            self._model.load_state_dict(self._gather("weights", self._own.weights))

    def _gather(self, what: str, compute: Callable[[], Any]) -> Any:
        has_parts = self._own.mesh.has_parts
        return self._together([("gather", what)] * len(self._others) * has_parts, compute)

    def _together(self, calls: Sequence[tuple[Any, ...]], compute: Callable[[], Any]) -> Any:
        """What this rank computes while the others answer their calls. An error of theirs is
        raised rather than that of this rank, which waited for them."""
        futures = [
            other.call(*call) for other, call in zip(self._others, calls, strict=bool(calls))
        ]
        try:
            found = compute()
        except RuntimeError:  # torch's, of a group that has lost a rank
            for future in futures:
                with suppress(TimeoutError):
                    future.result(ENDING_S)
            raise
        for future in futures:
            future.result(self._timeout_s)
        return found


def deal(rows: Sequence[ScoredExample], num_ranks: int) -> list[list[ScoredExample]]:
    """Each rank's rows: similar lengths and the same teachers at the same time."""
    order = sorted(rows, key=lambda r: (r.example.teacher_names, len(r.example.input_ids)))
    return [order[rank::num_ranks] for rank in range(num_ranks)]
