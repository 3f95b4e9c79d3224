"""A run that is killed and goes on gives what a run gives that is not, to the bit."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_hand import journaled_requests, make_model, make_requests, run, run_with_journal

from posttrain.rollout import Rollout
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal, JournalError
from posttrain.rollout.slots import V4Slots


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sharpness=3)


@pytest.fixture(scope="module")
def wanted() -> dict[Any, Rollout]:
    """Without a journal, on one thread: their number is a part of the rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(make_model(sharpness=3), journaled_requests(), 3)
    torch.set_num_threads(before)
    return found


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal")
    yield journal
    journal.close()


def assert_same(found: dict[Any, Rollout], wanted: dict[Any, Rollout]) -> None:
    assert found.keys() == wanted.keys()
    for key, rollout in found.items():
        assert replace(rollout, routes=None) == replace(wanted[key], routes=None)
        if rollout.routes is not None:
            assert np.array_equal(rollout.routes, wanted[key].routes)


def test_a_process_killed_at_any_time_goes_on_to_the_same_tokens(
    tmp_path: Path, wanted: dict[Any, Rollout]
) -> None:
    """SIGKILL as soon as the file has grown by some random bytes; now and then the end of the last
    record is torn off as well."""
    path, draw = tmp_path / "journal", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.deepseek_v4"])
    kills = 0
    for _ in range(4):
        process = context.Process(target=run_with_journal, args=(str(path),))
        process.start()
        grown = (path.stat().st_size if path.exists() else 0) + draw.randrange(1, 6000)
        while process.is_alive() and (not path.exists() or path.stat().st_size < grown):
            time.sleep(0.002)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if draw.random() < 0.5:
            os.truncate(path, path.stat().st_size - draw.randrange(1, 6))
    assert kills >= 2
    before = torch.get_num_threads()
    assert_same(run_with_journal(str(path)), wanted)
    torch.set_num_threads(before)


def test_every_token_is_in_the_file_before_it_is_used(model: Any, journal: Journal) -> None:
    asked = make_requests(3, max_new_tokens=6)
    counts: list[tuple[int, int]] = []

    def count(*_: Any) -> None:
        written = sum(line.count(b"[") - 1 for line in lines if b"tokens" in line)
        counts.append((written, len(counts) + 1))

    lines: list[bytes] = []

    def look(*args: Any) -> None:
        lines[:] = journal.path.read_bytes().splitlines()
        count(*args)

    run(model, asked, 2, journal=journal, on_token=look)
    assert counts
    assert all(written >= used for written, used in counts)


def test_finished_requests_are_not_sampled_and_tools_not_asked_again(
    model: Any, journal: Journal
) -> None:
    asked_tools: list[int] = []

    def tool(own: list[int]) -> list[int] | None:
        asked_tools.append(len(own))
        return [7, 8, 9] if len(own) < 8 else None

    asked = make_requests(8, max_new_tokens=60)
    asked = [replace(r, continue_turn=tool if i % 2 else None) for i, r in enumerate(asked)]
    first = run(model, asked, 3, journal=journal)
    turns = len(asked_tools)
    assert turns

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V4Slots, "step", refuse)
        patch.setattr(V4Slots, "ahead", refuse)
        assert run(model, asked, 3, journal=journal) == first
    assert len(asked_tools) == turns


def test_an_abandoned_run_goes_on_across_versions(journal: Journal) -> None:
    """Weights change on the way, and then the consumer leaves; the rest is of the new weights."""

    def start(engine: Engine) -> None:
        asked = [replace(r, stop_token_ids=()) for r in make_requests(4, max_new_tokens=25)]
        asked[0] = replace(asked[0], max_new_tokens=4)
        found.update({r.prompt_id: r for r in engine.run(asked)})

    other, results = make_model(seed=5, sharpness=3).state_dict(), []
    for is_abandoned in (False, True):
        model, found = make_model(sharpness=3), dict[str, Rollout]()
        journal.clear()
        engine = Engine(model, num_slots=4, seed=0, journal=journal)
        asked = [replace(r, stop_token_ids=()) for r in make_requests(4, max_new_tokens=25)]
        asked[0] = replace(asked[0], max_new_tokens=4)
        rollouts = engine.run(asked)
        next(rollouts)
        engine.update(3, lambda m=model: m.load_state_dict(other), rereads=True)  # pyright: ignore[reportUnknownLambdaType]
        if is_abandoned:
            engine.step()
            rollouts.close()  # pyright: ignore[reportAttributeAccessIssue]
            start(engine)
            found.pop("p0")
        else:
            found = {r.prompt_id: r for r in rollouts}
        results.append(found)
    assert results[0] == results[1]
    assert len(results[0]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0, the engine has 1"),
        ({"version": 2}, "version 0, the engine has 2"),
        ({"model": make_model(seed=3)}, "weights '[0-9a-f]+', the engine has"),
    ],
    ids=["seed", "version", "weights"],
)
def test_a_journal_of_another_run_is_refused(
    model: Any, journal: Journal, change: dict[str, Any], words: str
) -> None:
    asked = make_requests(2, max_new_tokens=3)
    run(model, asked, journal=journal)
    engine = Engine(
        change.get("model", model), num_slots=2, seed=change.get("seed", 0), journal=journal
    )
    engine.version = change.get("version", 0)
    with pytest.raises(JournalError, match=words):
        next(engine.run(asked))
    journal.clear()
    assert len(list(engine.run(asked))) == 2


def test_another_request_of_the_same_name_is_refused(model: Any, journal: Journal) -> None:
    (asked,) = make_requests(1, max_new_tokens=3)
    run(model, [asked], journal=journal)
    with pytest.raises(JournalError, match="prompt 'p0', sample 0, as another request"):
        run(model, [replace(asked, temperature=0.5)], journal=journal)


def test_a_journal_damaged_in_its_middle_is_refused_and_one_that_is_open(
    model: Any, journal: Journal
) -> None:
    asked = make_requests(2, max_new_tokens=6)
    run(model, asked, journal=journal)
    data = bytearray(journal.path.read_bytes())
    data[len(data) // 2] ^= 1
    journal.path.write_bytes(data)
    with pytest.raises(JournalError, match=r"damaged in line \d+ of \d+"):
        run(model, asked, journal=journal)
    with pytest.raises(JournalError, match="another process"):
        Journal(journal.path)
