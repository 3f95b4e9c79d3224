"""An answer that pauses and goes on is the answer that does not, to the bit."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from at_hand import journaled_requests, make_model, make_requests, run
from test_generic import make_model as make_other

from posttrain.rollout import Request, Rollout
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal, JournalError

Found = Mapping[Any, Rollout]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sharpness=3)


def in_parts(
    model: Any, asked: Sequence[Request], *, part: Mapping[Any, int], **options: Any
) -> tuple[dict[Any, Rollout], int]:
    """Each request goes on for `part` tokens a run; what they come to, and the number of runs."""
    ended: dict[Any, Rollout] = {}
    going = [replace(r, pause_at=part[r.prompt_id, r.sample]) for r in asked]
    by_key = {(r.prompt_id, r.sample): r for r in asked}
    for num_runs in range(1, 200):
        found = run(model, going, **options)
        paused = {key: r for key, r in found.items() if r.finish_reason == "paused"}
        ended |= {key: r for key, r in found.items() if key not in paused}
        for key, rollout in paused.items():
            assert len(rollout.response) >= going_at(going, key), "it paused before it was to"
        if not paused:
            return ended, num_runs
        going = [
            replace(by_key[key], begun=r, pause_at=len(r.response) + part[key])
            for key, r in paused.items()
        ]
    raise AssertionError("no end")


def going_at(going: Sequence[Request], key: Any) -> int:
    return next(r.pause_at for r in going if (r.prompt_id, r.sample) == key)


def assert_same(found: Found, wanted: Found) -> None:
    assert found.keys() == wanted.keys()
    for key, rollout in found.items():
        assert replace(rollout, routes=None) == replace(wanted[key], routes=None)
        if rollout.routes is not None:
            assert np.array_equal(rollout.routes, wanted[key].routes)


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_any_length_are_the_whole_with_tools_routes_and_supports(
    model: Any, seed: int
) -> None:
    draw, asked = random.Random(seed), journaled_requests()
    part = {(r.prompt_id, r.sample): draw.choice([1, 2, 7, 30]) for r in asked}
    found, num_runs = in_parts(model, asked, part=part, num_slots=draw.choice([2, 5, 16]))
    assert num_runs > 3
    assert_same(found, run(model, asked, 3))


def test_a_stop_string_is_found_across_a_pause(model: Any) -> None:
    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(94 + i) for i in ids)

    free = [replace(r, stop_token_ids=()) for r in make_requests(8, max_new_tokens=40)]
    said = [Letters().decode(r.response[5:7]) for r in run(model, free).values()]
    asked = [replace(r, stop_strings=tuple(said)) for r in free]
    part = {(r.prompt_id, r.sample): 1 for r in asked}
    found, _ = in_parts(model, asked, part=part, tokenizer=Letters())
    wanted = run(model, asked, tokenizer=Letters())
    assert all(r.finish_reason == "stop" for r in wanted.values())
    assert_same(found, wanted)


def test_a_rollout_that_goes_on_says_which_weights_sampled_each_token(model: Any) -> None:
    asked = [replace(r, stop_token_ids=()) for r in make_requests(3, max_new_tokens=9)]
    first = run(model, [replace(r, pause_at=4) for r in asked])
    assert {(r.finish_reason, len(r.response)) for r in first.values()} == {("paused", 4)}
    other = make_model(seed=5, sharpness=3)
    engine = Engine(other, num_slots=2, seed=0)
    engine.version = 3
    begun = [replace(r, begun=first[r.prompt_id, r.sample]) for r in asked]
    for rollout in engine.run(begun):
        before = first[rollout.prompt_id, rollout.sample]
        assert rollout.response[:4] == before.response
        assert rollout.logp[:4] == before.logp
        assert (rollout.version, rollout.versions) == (0, [0] * 4 + [3] * 5)
        # behind the pause it is what the other weights say of what stands there
        prompt = [*rollout.prompt, *before.response]
        assert not set(before.response) & {1, 5}
        again = Request(rollout.prompt_id, prompt, max_new_tokens=5, temperature=0)
        greedy = replace(
            asked[0], prompt_id=rollout.prompt_id, prompt=rollout.prompt, temperature=0
        )
        (one,), (two,) = (
            list(Engine(other, num_slots=1, seed=0).run([r]))
            for r in (again, replace(greedy, begun=before))
        )
        assert two.response[4:] == one.response
        assert two.logp[4:] == one.logp


def test_a_part_that_is_killed_goes_on_from_its_journal(model: Any, tmp_path: Path) -> None:
    asked = [replace(r, stop_token_ids=()) for r in make_requests(4, max_new_tokens=30)]
    begun = run(model, [replace(r, pause_at=5) for r in asked])
    going = [replace(r, begun=begun[r.prompt_id, r.sample], pause_at=20) for r in asked]
    wanted = run(model, going)
    journal = Journal(tmp_path / "journal")
    next(Engine(model, num_slots=2, seed=0, journal=journal).run(going))
    journal.close()
    journal = Journal(tmp_path / "journal")
    assert_same(run(model, going, journal=journal), wanted)
    with pytest.raises(JournalError, match="what it goes on from"):
        run(model, [replace(r, begun=None) for r in going], journal=journal)
    journal.close()


def test_only_what_has_paused_goes_on(model: Any) -> None:
    (asked,) = make_requests(1, max_new_tokens=3)
    (ended,) = run(model, [asked]).values()
    with pytest.raises(ValueError, match=r"'p0', sample 0, has ended by '(stop|length)'"):
        run(model, [replace(asked, begun=ended)])


def test_parts_of_another_model_are_the_whole_but_for_rounding() -> None:
    model = make_other("llama")
    asked = make_requests(6, max_new_tokens=17)
    part = {(r.prompt_id, r.sample): 4 for r in asked}
    found, num_runs = in_parts(model, asked, part=part)
    wanted = run(model, asked)
    assert num_runs > 2
    for key, rollout in found.items():
        assert rollout.response == wanted[key].response
        np.testing.assert_allclose(rollout.logp, wanted[key].logp, rtol=0, atol=1e-4)
