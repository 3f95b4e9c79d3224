"""A rollout depends on (seed, prompt id, sample), its prompt and the weights: to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from at_hand import make_model, make_requests, run

from posttrain.rollout import Request, Rollout
from posttrain.rollout.batch import Batch
from posttrain.rollout.slots import COLUMNS, V4Slots


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sharpness=3)


@pytest.fixture(scope="module", params=[False, True], ids=["", "with support"])
def requests(request: pytest.FixtureRequest) -> list[Request]:
    """As many as the most slots; prompts of up to three chunks; truncated, tempered and greedy
    rows among them. Those whose support is wanted go token by token."""
    asked = make_requests(64, longest=50, max_new_tokens=20)
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}]
    ways.append({"temperature": 0.0})
    wants = {"wants_support": request.param}
    return [replace(r, **wants, **ways[i % len(ways)]) for i, r in enumerate(asked)]


@pytest.fixture(scope="module")
def wanted(model: Any, requests: list[Request]) -> dict[Any, Rollout]:
    return run(model, requests, 64)


@pytest.mark.parametrize(("num_slots", "step"), [(1, 1), (7, -1), (64, -1), (3, 3)])
def test_tokens_and_logprobs_are_the_same_bits_for_any_slots_and_order(
    model: Any, requests: list[Request], wanted: dict[Any, Rollout], num_slots: int, step: int
) -> None:
    asked = requests[::step] if num_slots > 1 else requests[:4]
    found = run(model, asked, num_slots)
    assert len(found) == len(asked)
    assert all(wanted[key] == rollout for key, rollout in found.items())


def test_workers_that_share_the_requests_sample_what_one_does(
    model: Any, requests: list[Request], wanted: dict[Any, Rollout]
) -> None:
    assert run(model, requests[::2], 5) | run(model, requests[1::2], 5) == wanted


def test_threads_change_no_token(
    model: Any, requests: list[Request], wanted: dict[Any, Rollout]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before if before < 3 else 1)
    try:
        found = run(model, [replace(requests[0], max_new_tokens=5)], 64)
    finally:
        torch.set_num_threads(before)
    for key, rollout in found.items():
        assert rollout.response == wanted[key].response[:5]


def alone(model: Any, asked: list[Request]) -> dict[Any, Rollout]:
    """Each by itself, in one slot."""
    found: dict[Any, Rollout] = {}
    for request in asked:
        found |= run(model, [request], 1)
    return found


def counted(model: Any, asked: list[Request], num_slots: int) -> tuple[dict[Any, Rollout], int]:
    """Their rollouts, and how many tokens of prompts were read for them."""
    fed: list[int] = []

    class Counting(V4Slots):
        def step(self, live: Any, reading: Any, **options: Any) -> Any:
            fed.extend(len(ids) for _, ids in reading)
            return super().step(live, reading, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rollout.engine.V4Slots", Counting)
        return run(model, asked, num_slots), sum(fed)


def test_samples_of_one_prompt_read_it_once_and_are_as_if_alone(model: Any) -> None:
    """Ten samples in three slots, greedy tokens for the logits' sake, a stranger between them."""
    base, other = make_requests(2, longest=60, seed=3, max_new_tokens=8)
    samples = [replace(base, sample=n, max_new_tokens=3 + n) for n in range(10)]
    asked = [*samples[:6], replace(other, prompt_id="other"), *samples[6:]]
    found, num_read = counted(model, asked, 3)
    assert found == alone(model, asked)
    assert num_read <= len(base.prompt) + len(other.prompt)


def test_a_row_that_waits_for_its_prompt_is_moved_and_still_does_not_read_it(model: Any) -> None:
    """The last two of 18 slots share a prompt of five chunks; the others end at once."""
    asked = make_requests(16, longest=4, seed=4, max_new_tokens=1)
    prompt = [3 + (7 * i) % 30 for i in range(5 * COLUMNS)]
    long = [Request("long", prompt, sample=n, max_new_tokens=6) for n in range(2)]
    found, num_read = counted(model, [*asked, *long], 18)
    assert found == alone(model, [*asked, *long])
    assert num_read <= sum(len(request.prompt) for request in asked) + len(prompt)


def test_a_long_prompt_stalls_nobody(model: Any) -> None:
    """While one row reads a prompt of five chunks, another takes a token every step."""
    long, short = make_requests(2, longest=4, max_new_tokens=40)
    long = replace(long, prompt=[3 + i % 30 for i in range(5 * COLUMNS)], max_new_tokens=1)
    short = replace(short, prompt=short.prompt[:1], stop_token_ids=())
    seen: list[tuple[int, int]] = []

    class Watching(Batch):
        def fed(self, live: Any, reading: Any, logits_NV: Any, routes: Any) -> Any:
            seen.append((len(list(live)), len(reading)))
            return super().fed(live, reading, logits_NV, routes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rollout.engine.Batch", Watching)
        run(model, [long, short], 2)
    assert seen[:5] == [(1, 1)] * 5


def test_a_step_is_no_wider_than_its_rows_when_no_more_are_waiting(model: Any) -> None:
    """One long row among those that were in the highest of 64 slots: soon alone in a block."""
    asked = make_requests(40, longest=30, seed=5, max_new_tokens=4)
    asked[-1] = replace(asked[-1], max_new_tokens=30, stop_token_ids=())
    seen: list[tuple[int, int]] = []

    class Watching(V4Slots):
        def step(self, live: Any, reading: Any, **options: Any) -> Any:
            seen.append((len(live), max(live, default=-1)))
            return super().step(live, reading, **options)

        def ahead(self, slots: Any, num_steps: int) -> None:
            """Where there are no loops, all goes step by step."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rollout.engine.V4Slots", Watching)
        found = run(model, asked, 64)
    assert max(highest for _, highest in seen) == 39
    alone = [highest < 16 for count, highest in seen[4:] if count == 1]
    assert len(alone) > 20
    assert all(alone)
    assert found == run(model, asked, 7)


def test_rows_of_one_slot_follow_each_other_without_a_trace(model: Any) -> None:
    asked = make_requests(6, longest=50, seed=9, max_new_tokens=10)
    assert run(model, asked, 1) == run(model, asked[::-1], 1)


def test_a_prompt_that_is_copied_is_whole(model: Any) -> None:
    """One slot, so no other row makes the cache look as far as this prompt goes."""
    prompt = [3 + (7 * i) % 30 for i in range(300)]
    asked = [replace(make_requests(1)[0], prompt=prompt, sample=n) for n in range(3)]
    assert run(model, asked, 1) == alone(model, asked)
