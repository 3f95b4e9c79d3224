"""Several tokens at one go are, to the bit, the tokens one by one."""

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any

import pytest
from at_hand import make_model, make_requests, run, said_by_a_tool

from posttrain.rollout import Request, Rollout
from posttrain.rollout.ahead import STEPS
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal
from posttrain.rollout.slots import SlotsAhead, V4Slots

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "stop_token_ids": (1, 5, 6)},
    {"top_p": 0.8},
    {"top_k": 3, "stop_token_ids": ()},
    {"temperature": 0.0},
    {"wants_routes": True},
    {"continue_turn": said_by_a_tool},
    {"max_new_tokens": 1},
    {"max_new_tokens": STEPS + 1},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sharpness=3)


@pytest.fixture
def num_fed() -> Generator[list[int]]:
    """How many rows each step of several was of."""
    fed: list[int] = []
    real = SlotsAhead.step

    def step(self: SlotsAhead, token_n: Any, **options: Any) -> Any:
        fed.append(len(token_n))
        return real(self, token_n, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotsAhead, "step", step)
        yield fed


@pytest.fixture
def forwards(num_fed: list[int]) -> Generator[list[list[int]]]:
    """How many tokens of each row every forward was of, in a go or not."""
    found: list[list[int]] = []
    by_chunk, at_a_go = V4Slots.step, SlotsAhead.step

    def chunk(self: V4Slots, live: Any, reading: Any, **options: Any) -> Any:
        found.append([1] * len(live) + [len(ids) for _, ids in reading])
        return by_chunk(self, live, reading, **options)

    def go(self: SlotsAhead, token_n: Any, **options: Any) -> Any:
        found.append([1] * len(token_n))
        return at_a_go(self, token_n, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V4Slots, "step", chunk)
        patch.setattr(SlotsAhead, "step", go)
        yield found
    assert num_fed


def one_by_one(model: Any, asked: list[Request], num_slots: int) -> dict[Any, Rollout]:
    """Who is told of every token gets them so."""
    return run(model, asked, num_slots, on_token=lambda *_: None)


def as_lists(found: dict[Any, Rollout]) -> dict[Any, Rollout]:
    """Comparable: with routes as lists."""
    return {
        key: replace(r, routes=None if r.routes is None else r.routes.tolist())
        for key, r in found.items()
    }


@pytest.mark.parametrize("num_slots", [1, 3, 17, 40])
def test_tokens_at_one_go_are_those_one_by_one(
    model: Any, num_fed: list[int], num_slots: int
) -> None:
    asked = make_requests(36, longest=50, seed=21, max_new_tokens=30)
    asked = [replace(r, **WAYS[i % len(WAYS)]) for i, r in enumerate(asked)]
    found = run(model, asked, num_slots)
    assert num_fed
    count = len(num_fed)
    assert as_lists(found) == as_lists(one_by_one(model, asked, num_slots))
    assert len(num_fed) == count
    reasons = {r.finish_reason for r in found.values()}
    assert reasons == {"stop", "length"}


def test_nothing_is_computed_for_rows_that_have_ended(model: Any, num_fed: list[int]) -> None:
    asked = make_requests(20, longest=2, seed=22, max_new_tokens=40)
    asked = [replace(r, max_new_tokens=1 + i, stop_token_ids=()) for i, r in enumerate(asked)]
    found = run(model, asked, 20)
    assert num_fed == [sum(r.max_new_tokens > 1 + step for r in asked) for step in range(19)]
    assert [len(found[r.prompt_id, 0].response) for r in asked] == list(range(1, 21))


def test_a_row_that_needs_each_token_looked_at_makes_all_go_one_by_one(
    model: Any, num_fed: list[int]
) -> None:
    asked = make_requests(4, max_new_tokens=20)
    run(model, [*asked, replace(asked[0], sample=1, top_k=2, wants_support=True)], 8)
    assert not num_fed


def test_every_token_is_written_down_before_it_is_fed(model: Any, tmp_path: Path) -> None:
    asked = make_requests(5, longest=2, max_new_tokens=30)
    asked = [replace(r, stop_token_ids=()) for r in asked]
    journal, written = Journal(tmp_path / "journal"), list[int]()
    real = SlotsAhead.step

    def step(self: SlotsAhead, token_n: Any, **options: Any) -> Any:
        lines = [line for line in journal.path.read_bytes().splitlines() if b"tokens" in line]
        written.append(sum(line.count(b"[") - 1 for line in lines))
        return real(self, token_n, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotsAhead, "step", step)
        found = run(model, asked, 5, journal=journal)
    assert written == list(range(0, 150, 5))
    assert all(len(rollout.response) == 30 for rollout in found.values())
    journal.close()


def test_a_go_that_was_broken_off_is_followed_from_its_last_token(
    model: Any, num_fed: list[int], tmp_path: Path
) -> None:
    asked = [replace(r, stop_token_ids=()) for r in make_requests(3, max_new_tokens=40)]
    wanted, journal, write = run(model, asked, 3), Journal(tmp_path / "journal"), Journal.tokens
    whole = len(num_fed)

    class GoneError(Exception):
        """The process is."""

    def gone(self: Journal, taken: Any) -> None:
        if len(num_fed) == whole + STEPS + 3:
            raise GoneError
        write(self, taken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "tokens", gone)
        with pytest.raises(GoneError):
            run(model, asked, 3, journal=journal)
    num_fed.clear()
    assert run(model, asked, 3, journal=journal) == wanted
    assert len(num_fed) <= whole - STEPS - 2
    journal.close()


def test_other_weights_come_between_two_goes_and_are_said_of_every_token(model: Any) -> None:
    """A rollout that ends lets the learner in."""
    engine = Engine(model, num_slots=2, seed=0)
    asked = [replace(r, stop_token_ids=()) for r in make_requests(2, max_new_tokens=30)]
    asked[0] = replace(asked[0], max_new_tokens=3)
    found: dict[str, Rollout] = {}
    for rollout in engine.run(asked):
        found[rollout.prompt_id] = rollout
        engine.update(7)
    versions = found["p1"].versions
    assert set(versions) == {0, 7}
    assert versions == sorted(versions)
    assert len(versions) == 30


def test_rows_may_outgrow_the_room_that_the_cache_had(model: Any, num_fed: list[int]) -> None:
    prompt = [3 + (7 * i) % 30 for i in range(200)]
    asked = [Request("long", prompt, sample=n, max_new_tokens=150) for n in range(2)]
    found = run(model, asked, 2)
    assert len(num_fed) > 100
    assert found == one_by_one(model, asked, 1)


def test_a_finished_row_that_is_read_again_for_its_routes_samples_nothing(
    model: Any, num_fed: list[int], tmp_path: Path
) -> None:
    """In chunks of 16 tokens, the last of one."""
    journal = Journal(tmp_path / "journal")
    asked = Request("routes", [3, 4], max_new_tokens=16, wants_routes=True)
    found = as_lists(run(model, [asked], 1, journal=journal))
    assert len(found["routes", 0].response) == 16
    num_fed.clear()
    assert as_lists(run(model, [asked], 1, journal=journal)) == found
    assert not num_fed
    journal.close()


def test_a_row_that_ends_leaves_its_slot_to_the_next_forward(
    model: Any, forwards: list[list[int]]
) -> None:
    """Prompts of one token, which goes without a chunk."""
    asked = make_requests(5, longest=2, max_new_tokens=3)
    asked = [replace(r, stop_token_ids=()) for r in asked]
    asked[0] = replace(asked[0], max_new_tokens=40)
    found = run(model, asked, 2)
    assert {r.prompt_id: len(r.response) for r in found.values()} == {
        "p0": 40, "p1": 3, "p2": 3, "p3": 3, "p4": 3,
    }  # fmt: skip
    assert forwards == [[1, 1]] * 12 + [[1]] * 28


@pytest.mark.parametrize("place", [20, 23, 26])
def test_a_tool_is_asked_at_the_end_of_its_turn_and_heard_at_the_next_forward(
    model: Any, forwards: list[list[int]], place: int
) -> None:
    """Another row decodes meanwhile, by goes."""
    answer: Future[list[int] | None] = Future()
    asked_at: list[int] = []

    def ask(own: list[int]) -> Future[list[int] | None]:
        asked_at.append(len(forwards) - len(own))
        return answer

    real = SlotsAhead.step

    def step(self: SlotsAhead, token_n: Any, **options: Any) -> Any:
        if len(forwards) == place:
            answer.set_result([7, 8, 9])
        return real(self, token_n, **options)

    tool = Request("tool", [3], max_new_tokens=60, stop_token_ids=(1, 5), continue_turn=ask)
    other = Request("other", [4], max_new_tokens=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotsAhead, "step", step)
        found = run(model, [tool, other], 2)
    turn = found["tool", 0].is_own.index(False)
    assert turn < 20
    assert asked_at[0] == 0
    assert forwards[turn : place + 2] == [[1]] * (place + 1 - turn) + [[1, 4]]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_other_weights_from_another_thread_come_in_after_the_step_that_runs(
    model: Any, forwards: list[list[int]], place: int
) -> None:
    """Told in any step of a go."""
    engine = Engine(model, num_slots=2, seed=0)
    came_at: list[int] = []
    updater = Thread(target=lambda: engine.update(7, lambda: came_at.append(len(forwards))))
    real = SlotsAhead.step

    def step(self: SlotsAhead, token_n: Any, **options: Any) -> Any:
        if len(forwards) == 9 + place:
            updater.start()
            while updater.is_alive() and not engine._handover.num_waiting:
                sleep(0.001)
        return real(self, token_n, **options)

    asked = [Request(name, [3], max_new_tokens=60) for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotsAhead, "step", step)
        found = list(engine.run(asked))
    updater.join()
    assert came_at == [10 + place]
    assert [r.versions for r in found] == [[0] * (10 + place) + [7] * (50 - place)] * 2


def test_other_weights_come_in_while_all_wait_for_a_tool(model: Any) -> None:
    """Which here says nothing before they have."""
    answer: Future[list[int] | None] = Future()
    engine, came, was_in = Engine(model, num_slots=1, seed=0), Event(), list[bool]()

    def speak() -> None:
        was_in.append(came.wait(10))
        answer.set_result([7, 8])

    def update() -> None:
        sleep(0.2)  # the engine waits by then; where it does not yet, that is no less right
        engine.update(7, came.set)

    threads = [Thread(target=update), Thread(target=speak)]

    def ask(own: list[int]) -> Future[list[int] | None]:
        for thread in threads:
            thread.start()
        return answer

    asked = Request("a", [3], max_new_tokens=3, stop_token_ids=tuple(range(40)), continue_turn=ask)
    (found,) = engine.run([asked])
    for thread in threads:
        thread.join()
    assert was_in == [True]
    assert (found.finish_reason, len(found.response)) == ("length", 1)
