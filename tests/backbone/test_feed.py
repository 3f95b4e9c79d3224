"""A token has the same bits however it is fed: in any cut of its row, beside any other rows, by any
number of threads, in a chunk whose places are filled up, or steps ahead."""

from typing import Any

import numpy as np
import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

from posttrain.backbone import V4Cache
from posttrain.backbone.chunks import Chunk, room_for, step
from posttrain.backbone.feed import Ahead, feed, weights_for_loops
from posttrain.backbone.host import threads
from posttrain.backbone.routing import RouteTape

LENGTHS = (90, 1, 37, 64, 5, 90)
"""Rows of the window (7), top-k (3) and compression rates many times over, and of one token."""

SPARE = 41


@pytest.fixture(scope="module")
def model() -> Any:
    found = small_model(n_routed_experts=4, index_topk=3, hc_sinkhorn_iters=2).eval().model
    if weights_for_loops(found) is None:
        pytest.skip("there are no loops here")
    return found


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [draw.integers(3, VOCAB, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Each row's states by itself, a chunk of 16 places at a time."""
    found: list[Tensor] = []
    for ids in rows:
        cache, states = new_cache(model), list[Tensor]()
        for first in range(0, len(ids), 16):
            part = ids[first : first + 16]
            ids_DC = torch.tensor([part + [0] * (16 - len(part))])
            chunk = Chunk(ids_DC, torch.tensor([len(part)]), torch.tensor([2]))
            states.append(step(model, cache, chunk=chunk, reach=max(LENGTHS))[: len(part)])
        found.append(torch.cat(states))
    return found


def new_cache(model: Any) -> V4Cache:
    like = model.embed_tokens.weight
    cache = V4Cache(model.config, len(LENGTHS), like=like, num_spare=SPARE)
    cache.reserve(room_for(model.config, max(LENGTHS)))
    return cache


def fed(model: Any, rows: list[list[int]], *, seed: int) -> list[Tensor]:
    """All rows' states, in steps of random parts of random rows, in the order of a random
    placing."""
    draw, cache = np.random.default_rng(seed), new_cache(model)
    slots = draw.permutation(len(rows))
    states: list[list[Tensor]] = [[] for _ in rows]
    done = np.zeros(len(rows), np.int64)
    while (done < LENGTHS).any():
        counts = draw.integers(0, SPARE + 2, len(rows)) * draw.integers(0, 2, len(rows))
        counts = np.minimum(counts, LENGTHS - done)
        order = [row for row in draw.permutation(len(rows)) if counts[row]]
        if not order:
            continue
        token_T = [t for row in order for t in rows[row][done[row] : done[row] + counts[row]]]
        place_T = [done[row] + i for row in order for i in range(counts[row])]
        slot_T = np.repeat(slots[order], counts[order])
        weights = weights_for_loops(model)
        hidden_TH = feed(model, weights, cache, np.array(token_T), slot_T, np.array(place_T))
        for row, part in zip(order, hidden_TH.split(counts[order].tolist()), strict=True):
            states[row].append(part)
        done += counts
        assert cache.length_B[torch.from_numpy(slots)].tolist() == done.tolist()
    return [torch.cat(parts) for parts in states]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_cuts_neighbours_and_threads_change_no_bit(
    model: Any,
    rows: list[list[int]],
    alone: list[Tensor],
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for seed in range(4):
        for found, wanted in zip(fed(model, rows, seed=seed), alone, strict=True):
            assert torch.equal(found, wanted)


def test_steps_ahead_are_steps_for_the_rows_that_go_on(
    model: Any, rows: list[list[int]], alone: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cache, slots = new_cache(model), [4, 0, 3, 1, 5, 2]
    for first in range(0, max(LENGTHS), 13):
        on = [row for row, length in enumerate(LENGTHS) if length > first]
        steps = Ahead(model, weights_for_loops(model), cache, [slots[row] for row in on], 13)
        for place in range(first, min(first + 13, max(LENGTHS))):
            left = [n for n, row in enumerate(on) if LENGTHS[row] > place]
            steps.keep(np.array(left))
            on = [on[n] for n in left]
            token_n, tape = torch.tensor([rows[row][place] for row in on]), RouteTape(3)
            hidden_nH = steps.step(token_n, tape)
            for row, hidden_H in zip(on, hidden_nH, strict=True):
                assert torch.equal(hidden_H, alone[row][place])
            assert tape.choices.expert_LTk.shape[:2] == (3, len(on))
        fed = steps.close()
        assert sum(fed) == sum(min(max(n - first, 0), 13) for n in LENGTHS)
    assert cache.length_B[slots].tolist() == list(LENGTHS)


def test_the_tape_has_each_tokens_experts_in_the_order_of_the_tokens(
    model: Any, rows: list[list[int]]
) -> None:
    """Held against a forward over each row."""
    wanted: list[Tensor] = []
    for ids in rows[:3]:
        with torch.no_grad():
            routes = model(input_ids=torch.tensor([ids]), capture_routes=True).routes
        wanted.append(routes.expert_LTk)
    cache, tape = new_cache(model), RouteTape(3)
    token_T = np.array([t for ids in rows[:3] for t in ids[:30]])
    counts = [min(len(ids), 30) for ids in rows[:3]]
    place_T = np.concatenate([np.arange(count) for count in counts])
    slot_T = np.repeat([5, 1, 2], counts)
    feed(model, weights_for_loops(model), cache, token_T, slot_T, place_T, tape)
    found = tape.choices.expert_LTk.split(counts, dim=1)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.sort(-1).values, other[:, :30].sort(-1).values.to(one))
