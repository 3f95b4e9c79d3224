"""One step's rollouts, and what their teachers read of them.

A teacher's rows go to it as soon as the last of them is sampled, so that it works while the other
domains are still being sampled.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from distill.batch import Example, ScoredExample, example_from_rollout
from distill.endings import Until, describe_endings
from distill.schedule import Visit
from distill.staleness import Learned, describe_staleness, whole
from distill.teachers import Teachers
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task


@dataclass(frozen=True)
class Batch:
    """What a step learns from, in an order that does not depend on which rollout finished first."""

    rollouts: list[Rollout]
    answers: Sequence[Callable[[], list[ScoredExample]]]
    """One for each teacher or mixture of them."""

    paused: Sequence[Rollout] = ()
    """Those that go on beside the next step's."""

    def rows(self) -> list[ScoredExample]:
        """Those rollouts that hold an own token as their teachers see them; waits for them."""
        return [row for answer in self.answers for row in answer()]


def requests_of(
    visits: Iterable[Visit], tasks: Mapping[str, Task], temperature: float
) -> list[Request]:
    """One request per visit; a prompt's earlier visits give it its sample number."""
    requests: list[Request] = []
    for (domain, epoch), group in groupby(visits, key=lambda visit: (visit.domain, visit.epoch)):
        task = tasks[domain]
        rows = [task.train[visit.row] for visit in group]
        requests += task.requests(rows, sample=epoch, temperature=temperature)
    return requests


def read_along(
    rollouts: Iterable[Rollout],
    requests: Iterable[Request | Rollout],
    mixtures: Mapping[str, Mapping[str, float]],
    teachers: Teachers,
    *,
    step: int,
    is_warmup: bool = False,
    learned: Learned = whole,
) -> Batch:
    """Ask the teachers as the rollouts of the requests come in; `mixtures` gives each domain its
    weighted teachers. In a warm-up step rows are learned by the forward KL; of a rollout the tokens
    `learned(rollout)` are."""
    names_of = {domain: " + ".join(sorted(mixture)) for domain, mixture in mixtures.items()}
    left = Counter(names_of[request.domain] for request in requests)
    found: dict[str, list[Rollout]] = defaultdict(list)
    answers: dict[str, Callable[[], list[ScoredExample]]] = {}
    paused: list[Rollout] = []
    for rollout in rollouts:
        names = names_of[rollout.domain]
        if rollout.finish_reason == "paused":
            paused.append(rollout)
        else:
            found[names].append(replace(rollout, teacher=names))
        left[names] -= 1
        if left[names] == 0 and names in found:
            found[names].sort(key=lambda r: (r.domain, r.prompt_id, r.sample, r.sampled_by))
            coming = [mixtures[domain] for domain in sorted(mixtures) if left[names_of[domain]] > 0]
            then = min(coming[0]) if coming else None
            examples = examples_of(found[names], mixtures, is_warmup=is_warmup, learned=learned)
            answers[names] = teachers.ask(examples, step=step, then=then)
    return Batch(
        [rollout for names in sorted(found) for rollout in found[names]],
        [answers[names] for names in sorted(answers)],
        sorted(paused, key=lambda r: (r.domain, r.prompt_id, r.sample)),
    )


def examples_of(
    rollouts: Iterable[Rollout],
    mixtures: Mapping[str, Mapping[str, float]],
    *,
    is_warmup: bool,
    learned: Learned,
) -> list[Example]:
    """What there is to learn; rollouts without an own token among those are left out."""
    examples = (
        example_from_rollout(
            r, teachers=mixtures[r.domain], is_warmup=is_warmup, learned=learned(r)
        )
        for r in rollouts
    )
    return [example for example in examples if example is not None]


def describe(
    batch: Batch,
    *,
    version: int,
    num_rows: int,
    learned: Learned,
    until: Until,
    loop_window: int,
) -> dict[str, float]:
    """Of the student's own rollouts, but for `off_policy_prompts/<domain>`, which counts the
    teachers'. `prompts/<domain>`: rollouts; `length/<domain>`: their mean own tokens; `paused`:
    those that go on beside the next step's; `skipped`: all rollouts but the `num_rows` that are
    learned from; how old their tokens are (staleness.py), and how they end (endings.py)."""
    rollouts = batch.rollouts
    numbers: dict[str, float] = {"skipped": len(rollouts) - num_rows, "paused": len(batch.paused)}
    taught = Counter(rollout.domain for rollout in rollouts if rollout.sampled_by)
    numbers |= {f"off_policy_prompts/{domain}": count for domain, count in taught.items()}
    rollouts = [rollout for rollout in rollouts if not rollout.sampled_by]
    numbers |= describe_staleness(rollouts, version=version, learned=learned)
    by_domain: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_domain[rollout.domain].append(rollout)
    for domain, group in by_domain.items():
        numbers[f"prompts/{domain}"] = len(group)
        numbers[f"length/{domain}"] = sum(sum(r.is_own) for r in group) / len(group)
    return numbers | describe_endings(rollouts, until=until, loop_window=loop_window)
