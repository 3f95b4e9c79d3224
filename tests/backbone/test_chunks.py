"""A token's hidden state is the same bits however it comes: alone or in a chunk, of any cut, beside
any other rows, in any slot of any number of slots."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

from posttrain.backbone import V4Cache
from posttrain.backbone.chunks import Chunk, room_for, step
from posttrain.backbone.decode_keys import attend, bias_of, whole
from posttrain.backbone.routing import RouteTape

LENGTH = 90
"""Rows pass the window (7) twelve times, top-k (3) and whole blocks of 16 CSA entries."""


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(n_routed_experts=4, index_topk=3, hc_sinkhorn_iters=2).eval().model


def draw(generator: torch.Generator, *shape: int, low: int = 3, high: int = VOCAB) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def new_cache(model: Any, num_slots: int, num_spare: int = 41) -> V4Cache:
    like = model.embed_tokens.weight
    cache = V4Cache(model.config, num_slots, like=like, num_spare=num_spare)
    cache.reserve(room_for(model.config, LENGTH))
    return cache


def decoded(model: Any, ids: Tensor, num_slots: int, slot: int, share_live: float) -> Tensor:
    """Each token's state (LENGTH, H), fed one by one beside random rows, some of them live."""
    generator, cache = torch.Generator().manual_seed(num_slots), new_cache(model, num_slots)
    states: list[Tensor] = []
    for token in ids:
        token_B = draw(generator, num_slots)
        is_live_B = (torch.rand(num_slots, generator=generator) < share_live).long()
        token_B[slot], is_live_B[slot] = token, 1
        reach = int(cache.length_B.max()) + 1
        states.append(step(model, cache, token_B=token_B, is_live_B=is_live_B, reach=reach)[slot])
    return torch.stack(states)


def chunked(model: Any, ids: Tensor, shape: tuple[int, int], num_slots: int, slot: int) -> Tensor:
    """The same in chunks of this shape, of random cuts, beside rows of random tokens and lengths
    in the chunk, and decoding ones."""
    rows, columns = shape
    generator, cache = torch.Generator().manual_seed(rows + columns), new_cache(model, num_slots)
    states: list[Tensor] = []
    while (start := sum(len(x) for x in states)) < LENGTH:
        slot_D = torch.randperm(num_slots, generator=generator)[:rows]
        ids_DC, length_D = draw(generator, *shape), draw(generator, rows, low=0, high=columns + 1)
        length_D[(cache.length_B[slot_D] + columns > LENGTH) | (slot_D == slot)] = 0
        row = int(draw(generator, low=0, high=rows))
        part = ids[start : start + int(draw(generator, low=1, high=columns + 1))]
        slot_D[row], length_D[row], ids_DC[row, : len(part)] = slot, len(part), part
        is_live_B = (torch.rand(num_slots, generator=generator) < 0.5).long()
        is_live_B[slot_D] = 0
        is_live_B[cache.length_B >= LENGTH] = 0
        hidden_TH = step(
            model,
            cache,
            token_B=draw(generator, num_slots),
            is_live_B=is_live_B,
            chunk=Chunk(ids_DC, length_D, slot_D),
            reach=LENGTH,
        )
        states.append(hidden_TH[num_slots:].view(rows, columns, -1)[row, : len(part)])
    return torch.cat(states)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return draw(torch.Generator().manual_seed(1), LENGTH)


@pytest.fixture(scope="module")
def alone(model: Any, ids: Tensor) -> Tensor:
    return decoded(model, ids, 16, 3, 0.0)


def test_a_step_is_the_full_forward(model: Any, ids: Tensor, alone: Tensor) -> None:
    with torch.no_grad():
        wanted = model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(alone, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("num_slots", "slot", "live"), [(16, 0, 1.0), (32, 17, 0.4), (64, 63, 1)])
def test_a_row_is_the_same_bits_in_any_slot_beside_any_rows(
    model: Any, ids: Tensor, alone: Tensor, num_slots: int, slot: int, live: float
) -> None:
    assert torch.equal(decoded(model, ids, num_slots, slot, live), alone)


def test_a_step_of_the_first_slots_alone_is_theirs_among_all(model: Any, ids: Tensor) -> None:
    """To the bit, and the other slots keep what they hold."""
    ids_TB = ids[:80].view(2, 40)[:, :32].repeat_interleave(6, dim=0)
    is_live_B = (torch.arange(32) < 16).long()
    few, all_of_them = new_cache(model, 32), new_cache(model, 32)
    for token_B in ids_TB[:9]:
        for cache in (few, all_of_them):
            reach = int(cache.length_B.max()) + 1
            step(model, cache, token_B=token_B, is_live_B=torch.ones_like(is_live_B), reach=reach)
    kept = [x[16:].clone() for x in tensors(few)]
    for token_B in ids_TB[9:]:
        reach = int(few.length_B.max()) + 1
        found = step(model, few, token_B=token_B[:16], is_live_B=is_live_B[:16], reach=reach)
        wanted = step(model, all_of_them, token_B=token_B, is_live_B=is_live_B, reach=reach)
        assert torch.equal(found, wanted[:16])
    assert few.length_B.tolist() == [12] * 16 + [9] * 16
    assert all(torch.equal(x[16:], y) for x, y in zip(tensors(few), kept, strict=True))


@pytest.mark.parametrize("shape", [(1, 16), (2, 32), (8, 8), (16, 3)])
@pytest.mark.parametrize("num_slots", [16, 48])
def test_a_row_is_the_same_bits_in_chunks_of_any_shape(
    model: Any, ids: Tensor, alone: Tensor, shape: tuple[int, int], num_slots: int
) -> None:
    assert torch.equal(chunked(model, ids, shape, num_slots, num_slots - 2), alone)


def test_a_chunk_alone_fills_the_cache_as_decoding_does(model: Any, ids: Tensor) -> None:
    one, other = new_cache(model, 16), new_cache(model, 16)
    for start in range(0, 64, 16):
        chunk = Chunk(ids[None, start : start + 16], torch.tensor([16]), torch.tensor([2]))
        step(model, one, chunk=chunk, reach=64)
    is_live_B = torch.zeros(16, dtype=torch.long)
    is_live_B[2] = 1
    for token in ids[:64]:
        step(model, other, token_B=token.expand(16), is_live_B=is_live_B, reach=64)
    assert torch.equal(one.length_B, other.length_B)
    for kept, wanted in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(kept[2], wanted[2])


def tensors(cache: V4Cache) -> Sequence[Tensor]:
    """All that a cache keeps of its rows."""
    stores = [store for layer in cache.stores for store in layer.values()]
    return [*cache.window_BWd, *(x for s in stores for x in (s.entry_BEC, s.kv_BRX, s.gate_BRX))]


def test_a_tape_takes_the_routes_of_real_tokens_alone(model: Any, ids: Tensor) -> None:
    cache, tape, wanted = new_cache(model, 16), RouteTape(3), RouteTape(3)
    is_live_B = torch.zeros(16, dtype=torch.long)
    is_live_B[5] = 1
    chunk = Chunk(ids[:16].view(2, 8), torch.tensor([5, 0]), torch.tensor([2, 0]))
    step(
        model, cache, token_B=ids[40].expand(16), is_live_B=is_live_B, chunk=chunk, reach=9,
        tape=tape,
    )  # fmt: skip
    model.prefill([[int(ids[40])], ids[:5].tolist()], new_cache(model, 2), [0, 1], tape=wanted)
    assert torch.equal(tape.choices.expert_LTk, wanted.choices.expert_LTk)


def test_a_chunk_that_the_rings_cannot_hold_is_refused(model: Any, ids: Tensor) -> None:
    chunk = Chunk(ids[None, :16], torch.tensor([16]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"16 columns.*14 spare"):
        step(model, new_cache(model, 16, num_spare=14), chunk=chunk, reach=16)


@pytest.mark.parametrize("num_seen", [100, 200, 333, 700])
def test_keys_that_a_token_does_not_see_change_no_bit(num_seen: int) -> None:
    """However many of them another row's length puts behind those it sees."""
    generator = torch.Generator().manual_seed(num_seen)
    q, sink = torch.randn(16, 4, 16, generator=generator), torch.randn(4, generator=generator)
    keys = torch.zeros(16, 2048, 16)
    keys[:, :num_seen] = torch.randn(16, num_seen, 16, generator=generator)
    is_hidden = torch.arange(2048).expand(16, -1) >= num_seen
    found = [
        attend(q, [(keys[:, :size], bias_of(is_hidden[:, :size], q.dtype))], sink, 0.3)
        for size in (whole(num_seen), whole(num_seen) + 16, 1024, 2048)
    ]
    assert all(torch.equal(x, found[0]) for x in found[1:])
