"""Stops, tools, supports, routes and weights that change on the way."""

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from at_hand import VOCAB, make_model, make_requests, run, said_by_a_tool

from posttrain.backbone.routing import ExpertChoices
from posttrain.rollout import Request
from posttrain.rollout.engine import Engine
from posttrain.rollout.slots import V4Slots
from posttrain.rollout.stops import Stops


class Letters:
    """A tokenizer: token 3 is "a", 4 "b", ...; 39 is the first half of an e with an accent, 38 the
    second."""

    def decode(self, ids: list[int], **_: Any) -> str:
        parts = [{39: b"\xc3", 38: b"\xa9"}.get(i, bytes([94 + i])) for i in ids]
        return b"".join(parts).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(sharpness=3)


def test_a_stop_string_may_span_tokens_and_characters_tokens() -> None:
    stops = Stops(["cab", "b\xe9"], Letters())
    says = [5, 3, 5, 3, 4]  # c a c a b
    assert [stops.completed(says[: n + 1], 0) for n in range(5)] == ["", "", "", "", "cab"]
    assert stops.completed([4, 39], 0) == ""
    assert stops.completed([4, 39, 38], 0) == "b\xe9"
    assert stops.completed(says, 3) == ""  # of this turn alone
    assert stops.completed([*[3] * 500, *says], 0) == "cab"


def test_a_stop_string_ends_a_response_where_its_text_is_complete(model: Any) -> None:
    asked = [replace(r, stop_token_ids=()) for r in make_requests(12, max_new_tokens=30)]
    free = run(model, asked)
    strings = ("ab", "c", "zq")
    stopped = run(model, [replace(r, stop_strings=strings) for r in asked], tokenizer=Letters())
    assert {r.finish_reason for r in stopped.values()} >= {"stop"}
    for key, rollout in stopped.items():
        text = Letters().decode(free[key].response)
        ends = [text.index(s) + len(s) for s in strings if s in text]
        assert rollout.response == free[key].response[: min(ends, default=30)]
        assert rollout.finish_reason == ("stop" if ends else "length")
        assert Letters().decode(rollout.response).endswith(rollout.stop_string)


def test_stop_strings_without_a_tokenizer_are_refused(model: Any) -> None:
    asked = [replace(r, stop_strings=("a",)) for r in make_requests(1)]
    with pytest.raises(ValueError, match="tokenizer="):
        run(model, asked)


@pytest.mark.parametrize("num_tool_threads", [0, 3])
def test_a_tool_may_be_slow_and_nothing_is_read_twice(model: Any, num_tool_threads: int) -> None:
    asked = make_requests(9, seed=4, max_new_tokens=150, continue_turn=said_by_a_tool)
    fed: list[int] = []

    class Counting(V4Slots):
        def step(self, live: Any, reading: Any, **options: Any) -> Any:
            fed.extend([len(live), *(len(ids) for _, ids in reading)])
            return super().step(live, reading, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rollout.engine.V4Slots", Counting)
        found = run(model, asked, 3, num_tool_threads=num_tool_threads)
    assert found == run(model, asked[::-1], 16)
    assert any(not all(r.is_own) for r in found.values())
    assert sum(fed) <= sum(len(r.prompt) + len(r.response) for r in found.values())


def test_rows_go_on_while_a_tool_works(model: Any) -> None:
    answer: Future[list[int] | None] = Future()
    slow = Request("slow", [3], max_new_tokens=60, stop_token_ids=tuple(range(VOCAB)))
    slow = replace(slow, continue_turn=lambda _: answer)
    others = make_requests(5, seed=6, max_new_tokens=6)
    rollouts = Engine(model, num_slots=2, seed=0).run([slow, *others])
    first = [next(rollouts).prompt_id for _ in others]
    assert sorted(first) == sorted(r.prompt_id for r in others)
    threading.Timer(0.05, answer.set_result, [None]).start()
    (last,) = rollouts
    assert (last.prompt_id, last.finish_reason, len(last.response)) == ("slow", "stop", 1)


def test_what_was_left_to_sample_from_is_recorded(model: Any) -> None:
    asked = make_requests(6, max_new_tokens=12, top_p=0.7, wants_support=True)
    for rollout in run(model, asked).values():
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt + rollout.response])).logits[0]
        p = logits[len(rollout.prompt) - 1 : -1].double().softmax(-1)
        for step, token in enumerate(rollout.response):
            kept = rollout.support[step] or list(range(VOCAB))
            assert token in kept
            assert float(p[step, kept].sum()) > 0.7 - 1e-4
            logp = float((p[step, token] / p[step, kept].sum()).log())
            assert abs(rollout.kept_logp[step] - logp) < 1e-4
            assert abs(rollout.logp[step] - float(p[step, token].log())) < 1e-4


def test_routes_are_those_of_the_full_forward_and_can_be_replayed(model: Any) -> None:
    asked = make_requests(4, longest=60, seed=8, max_new_tokens=80, continue_turn=said_by_a_tool)
    asked = [replace(asked[0], sample=n) for n in range(4)] + asked[1:]
    plain = run(model, asked, 3)
    found = run(model, [replace(r, wants_routes=True) for r in asked], 3)
    for key, rollout in found.items():
        assert replace(rollout, routes=None) == plain[key]
        ids = torch.tensor([rollout.prompt + rollout.response])
        with torch.no_grad():
            routes = model.model(ids[:, :-1], capture_routes=True).routes
        fed = torch.from_numpy(rollout.routes[:-1]).long()
        assert torch.equal(fed.transpose(0, 1), routes.expert_LTk.long())
        assert (rollout.routes[-1] == -1).all()
        whole = ExpertChoices(torch.from_numpy(rollout.routes).transpose(0, 1))
        model.model(ids, replay_routes=whole)


@pytest.mark.parametrize("rereads", [False, True])
def test_weights_may_change_on_the_way_and_every_token_says_under_which(rereads: bool) -> None:
    model, other = make_model(sharpness=3), make_model(seed=5, sharpness=3)
    asked = [replace(r, stop_token_ids=()) for r in make_requests(3, max_new_tokens=20)]
    asked = [replace(asked[0], max_new_tokens=5), *asked[1:]]
    engine = Engine(model, num_slots=3, seed=0)
    rollouts, found = engine.run(asked), []
    found.append(next(rollouts))
    engine.update(7, lambda: model.load_state_dict(other.state_dict()), rereads=rereads)
    found += rollouts
    assert found[0].versions == []
    for rollout in found[1:]:
        at = rollout.versions.index(7)
        assert rollout.version == 0
        assert rollout.versions == [0] * at + [7] * (20 - at)
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt + rollout.response])).logits[0]
        logp = logits[len(rollout.prompt) - 1 : -1].double().log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(rollout.response)[:, None]).squeeze(1)[at:]
        gap = (torch.tensor(rollout.logp[at:]) - wanted).abs().max()
        assert (float(gap) < 1e-4) == rereads  # else the past is as the old weights made it


def test_a_prompt_read_under_earlier_weights_is_read_again() -> None:
    model, other = make_model(sharpness=3), make_model(seed=5, sharpness=3)
    base = replace(make_requests(1, longest=30)[0], max_new_tokens=6)
    asked = [replace(base, sample=n) for n in range(3)]
    engine = Engine(model, num_slots=1, seed=0)
    rollouts = engine.run(asked)
    next(rollouts)
    engine.update(1, lambda: model.load_state_dict(other.state_dict()))
    found = list(rollouts)
    wanted = run(other, asked[1:], 1)
    assert [r.response for r in found] == [wanted[r.prompt_id, r.sample].response for r in found]
    assert [r.logp for r in found] == [wanted[r.prompt_id, r.sample].logp for r in found]


@pytest.mark.parametrize("place", range(5, 10))
@pytest.mark.parametrize("who", ["on_token", "tool"])
def test_weights_put_in_from_within_a_step_are_those_of_each_token_that_follows(
    who: str, place: int
) -> None:
    """Greedy tokens are the argmax of full forwards of the weights that they name."""
    weights = {version: make_model(seed=version) for version in (0, 5)}
    model, calls = make_model(), [0]

    def called() -> int:
        calls[0] += 1
        if calls[0] == place:
            state = weights[5].state_dict()
            engine.update(5, lambda: model.load_state_dict(state), rereads=True)
        return calls[0]

    asked = [replace(r, temperature=0) for r in make_requests(6, max_new_tokens=20)]
    if who == "tool":
        ends = tuple(range(3, VOCAB, 4))
        asked = [
            replace(r, stop_token_ids=ends, continue_turn=lambda _: [7, 8] if called() else None)
            for r in asked
        ]

    def tell(*_: Any) -> None:
        called()

    on_token = tell if who == "on_token" else None
    engine = Engine(model, num_slots=3, seed=0, on_token=on_token)
    found = list(engine.run(asked))
    assert {version for r in found for version in r.token_versions} == {0, 5}
    for rollout in found:
        ids, start = [*rollout.prompt, *rollout.response], len(rollout.prompt)
        for t in (t for t, own in enumerate(rollout.is_own) if own):
            with torch.no_grad():
                logits = weights[rollout.token_versions[t]](torch.tensor([ids[: start + t]])).logits
            assert int(logits[0, -1].argmax()) == rollout.response[t]


def test_other_weights_come_in_while_all_wait_for_a_tool_and_from_its_own_thread(
    model: Any,
) -> None:
    came_in: list[int] = []

    def ask(_: list[int]) -> list[int] | None:
        engine.update(3, lambda: came_in.append(3))  # from the tool's thread
        other = threading.Thread(target=lambda: engine.update(4, lambda: came_in.append(4)))
        other.start()
        other.join(20)
        return None

    engine = Engine(model, num_slots=2, seed=0, num_tool_threads=1)
    every = tuple(range(VOCAB))
    asked = replace(make_requests(1)[0], stop_token_ids=every, continue_turn=ask)
    (rollout,) = engine.run([asked])
    assert (rollout.finish_reason, came_in, engine.version) == ("stop", [3, 4], 4)
