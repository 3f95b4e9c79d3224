"""The grading process: `python -m rewards.worker`, started and driven by `rewards.grader.Grader`.

Requests come on stdin as length-prefixed pickles (the parent is trusted): first a `Setup`, then
batches, each a list of pickled (response, row) pairs. Replies leave on the original stdout as JSON
lines: one when the rewards are loaded, one when a batch is unpacked, then one for each item. What
rewards print goes to stderr; what they read is empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, BinaryIO, cast

from rewards.registry import load_reward
from rewards.score import Reward, RewardError, Score
from rewards.wire import Setup, read_frame, send_json

MAX_REASON = 500
"""Characters of a reason that are sent back."""


@dataclass(frozen=True, slots=True)
class Term:
    """One named reward with its weight in the sum."""

    name: str
    weight: float
    reward: Reward
    fields: frozenset[str] | None
    """The fields of a row that it takes; None for all."""


class Unusable(Exception):
    """A reward's value is no score. `kind` is the key under which the grader counts it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def grade(terms: Sequence[Term], response: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to send: the weighted sum of the terms, or 0 and why one of them failed."""
    try:
        scores = {term.name: _term_score(term, response, row) for term in terms}
        total = sum(term.weight * scores[term.name].reward for term in terms)
        if not math.isfinite(total):
            raise Unusable("not_finite", f"the weighted sum is {total}")
    except Unusable as error:
        return _reply(0.0, str(error), failure=error.kind)
    parts = [f"{name}: {s.reason}" if len(terms) > 1 else s.reason for name, s in scores.items()]
    values: dict[str, float] = {}
    for name, score in scores.items():
        values[name] = score.reward
        values.update({f"{name}/{part}": value for part, value in score.terms.items()})
    return _reply(total, "; ".join(parts), terms=values)


def _term_score(term: Term, response: str, row: Mapping[str, Any]) -> Score:
    given = {k: v for k, v in row.items() if term.fields is None or k in term.fields}
    given.pop("response", None)  # a row's demonstration is not what is graded
    try:
        value = term.reward(response, **given)
    except RewardError as error:
        raise Unusable("bad_gold", f"{term.name}: {error}") from error
    except BaseException as error:
        reason = f"{term.name} raised {type(error).__name__}: {error}"
        raise Unusable("raised", reason) from error
    if not isinstance(value, Score):
        number = _finite(term.name, value)
        return Score(number, f"{term.name} gave {number:g}")
    reason, parts = cast("tuple[object, object]", (value.reason, value.terms))
    if not (isinstance(reason, str) and isinstance(parts, Mapping)):
        raise Unusable("wrong_type", f"{term.name}: a Score has a text and a dict after its number")
    values = {str(part): _finite(f"{term.name}/{part}", x) for part, x in parts.items()}
    return Score(_finite(term.name, value.reward), reason, values)


def _finite(name: str, value: object) -> float:
    if not isinstance(value, Real):
        raise Unusable("wrong_type", f"{name} is {type(value).__name__}, not a number or a Score")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Unusable("not_finite", f"{name} is {number}")
    return number


def _reply(
    reward: float, reason: str, *, terms: Mapping[str, float] | None = None, failure: str = ""
) -> dict[str, Any]:
    reason = reason if len(reason) <= MAX_REASON else reason[:MAX_REASON] + "..."
    return {"reward": reward, "reason": reason, "terms": dict(terms or {}), "failure": failure}


def _load_terms(setup: Setup) -> list[Term]:
    terms: list[Term] = []
    for name, weight in setup.rewards.items():
        reward = load_reward(name, setup.folder)
        parameters = inspect.signature(reward).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        fields = None if takes_all else frozenset(p.name for p in parameters)
        terms.append(Term(name, weight, reward, fields))
    return terms


def _prepare(
    terms: Sequence[Term], items: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """Our rewards may load what these items need before the clock of the first one starts, and say
    what of it is worth knowing."""
    facts: dict[str, str] = {}
    for term in terms:
        if term.reward.__module__.startswith("rewards."):
            prepare = getattr(sys.modules[term.reward.__module__], "prepare", None)
            if prepare is not None:
                with contextlib.suppress(Exception):  # it comes back from the first item
                    facts.update(prepare(items) or {})
    return facts


def _unpacked(packed: bytes) -> tuple[str, Mapping[str, Any]] | str:
    """The item, or why there is none."""
    try:
        return pickle.loads(packed)
    except Exception as error:  # noqa: BLE001 - a class of the user's may raise anything
        return f"the row cannot be sent to the grading process: {type(error).__name__}: {error}"


def _serve(terms: Sequence[Term], setup: Setup, requests: BinaryIO, replies: BinaryIO) -> None:
    while (frame := read_frame(requests)) is not None:
        items = [_unpacked(packed) for packed in pickle.loads(frame)]
        facts = _prepare(terms, [item for item in items if not isinstance(item, str)])
        send_json(replies, {"began": len(items), "facts": facts})
        for item in items:
            limit_cpu(setup.timeout_s)
            if isinstance(item, str):
                send_json(replies, _reply(0.0, item, failure="bad_gold"))
            else:
                send_json(replies, grade(terms, *item))


def _limit(which: int, soft: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    try:
        resource.setrlimit(which, (soft, hard))
    except (ValueError, OSError) as error:  # macOS refuses RLIMIT_AS
        sys.stderr.write(f"posttrain grader: resource limit {which} was not set: {error}\n")


def limit_cpu(timeout_s: float) -> None:
    """End a reward that spins in C, where no thread of this process can run, when nobody waits any
    more. Far above the deadline that the parent keeps; the kernel counts whole seconds."""
    _limit(resource.RLIMIT_CPU, int(time.process_time() + 4 * timeout_s) + 2)


def _die_with(parent: int, *, is_main_thread: bool) -> None:
    """End this process when the grader's process ends, also while a reward hangs."""
    if is_main_thread and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    else:
        # The signal would come when the thread that started this process ends.
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)  # with whatever the rewards have started


def _own_streams() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes, out of the reach of `print` and `input`."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def main() -> None:
    requests, replies = _own_streams()
    frame = read_frame(requests)
    if frame is None:
        return
    setup: Setup = pickle.loads(frame)
    _die_with(setup.parent, is_main_thread=setup.is_main_thread)
    _limit(resource.RLIMIT_AS, int(setup.memory_gb * 2**30))
    _limit(resource.RLIMIT_CORE, 0)
    try:
        terms = _load_terms(setup)
    except RewardError as error:
        send_json(replies, {"error": str(error)})
        return
    send_json(replies, {"ready": True})
    _serve(terms, setup, requests, replies)


if __name__ == "__main__":
    main()
