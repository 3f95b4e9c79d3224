"""The cache: what is taken back, moved or replaced leaves no trace, and its size is a formula."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_config, small_model
from torch import Tensor

from posttrain.backbone import V4Cache
from posttrain.backbone.cache import RECOUNT, bytes_per_token, cache_bytes
from posttrain.backbone.presets import CSA, HCA, SLIDING


def make_config(layer_types: Sequence[str] = (SLIDING, CSA, HCA)) -> Any:
    """Window (7), top-k (3) and rates (4, 8) that forty tokens pass many times."""
    return small_config(layer_types, n_routed_experts=4, index_topk=3, hc_sinkhorn_iters=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model(n_routed_experts=4, index_topk=3, hc_sinkhorn_iters=4).eval().model


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any, num_slots: int, num_spare: int = 0) -> V4Cache:
    return V4Cache(model.config, num_slots, like=model.embed_tokens.weight, num_spare=num_spare)


def filled(model: Any, lengths: Sequence[int], *, num_spare: int = 0, seed: int = 1) -> V4Cache:
    """Rows of so many random tokens."""
    cache = new_cache(model, len(lengths), num_spare)
    ids = draw(len(lengths), max(lengths), seed=seed).tolist()
    prompts = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    model.prefill(prompts, cache, list(range(len(lengths))))
    return cache


def feed(model: Any, cache: V4Cache, token_BS: Tensor, is_live_B: Tensor | None = None) -> Tensor:
    """Hidden states (B, S, H) of further tokens, one step each."""
    is_live_B = torch.ones(len(token_BS), dtype=torch.long) if is_live_B is None else is_live_B
    return torch.stack([model.decode(t, cache, is_live_B) for t in token_BS.unbind(1)], dim=1)


def test_the_size_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = [SLIDING, CSA, HCA]
    for _ in range(10):
        n, slots, tokens, spare = torch.randint(1, 40, (4,), generator=generator).tolist()
        picks = torch.randint(0, 3, (1 + n % 5,), generator=generator).tolist()
        config = make_config([kinds[i] for i in picks])
        dtype = (torch.float32, torch.bfloat16)[n % 2]
        cache = V4Cache(config, slots, like=torch.zeros(1, dtype=dtype), num_spare=spare)
        assert cache.nbytes == cache_bytes(config, slots, 0, dtype, num_spare=spare)
        cache.reserve(tokens)
        assert cache.nbytes == cache_bytes(config, slots, tokens, dtype, num_spare=spare)
        grown = cache_bytes(config, slots, tokens + 80, dtype, num_spare=spare)
        assert grown - cache.nbytes == 80 * slots * bytes_per_token(config, dtype)


def test_a_token_of_flash_takes_half_a_kilobyte_a_pair_of_layers() -> None:
    # bf16: CSA (512 + 128) / 4 * 2 = 320 bytes, HCA 512 / 128 * 2 = 8 bytes
    config = make_config([SLIDING, CSA, HCA])
    config.update({"head_dim": 512, "index_head_dim": 128, "compress_rates": {CSA: 4, HCA: 128}})
    assert bytes_per_token(config, torch.bfloat16) == 328


def test_room_grows_by_doubling_and_keeps_what_is_there(model: Any) -> None:
    cache = filled(model, [5, 13])
    store = cache.compressed(1, "indexer")
    before, copies = store.entry_BEC.clone(), 0
    for num_tokens in range(1, 2000):
        address = store.entry_BEC.data_ptr()
        cache.reserve(num_tokens)
        assert store.entry_BEC.shape[1] >= num_tokens // 4
        copies += address != store.entry_BEC.data_ptr()
    assert copies <= 8  # 13 tokens doubled to 2000
    assert torch.equal(store.entry_BEC[:, : before.shape[1]], before)
    assert not store.entry_BEC[:, before.shape[1] :].any()


@pytest.mark.parametrize("back", [1, 9])
def test_what_is_taken_back_was_never_there(model: Any, back: int) -> None:
    lengths = [1, 9, 16, 23, 30]
    seen, wanted = filled(model, lengths, num_spare=9), filled(model, lengths, num_spare=9)
    feed(model, seen, draw(5, back, seed=2))
    seen.take_back(back)
    assert seen.length_B.tolist() == lengths
    token_BS = draw(5, 9, seed=3)
    assert torch.equal(feed(model, seen, token_BS), feed(model, wanted, token_BS))


def test_rows_go_back_by_different_numbers_again_and_again(model: Any) -> None:
    seen, wanted = filled(model, [6, 12, 15], num_spare=4), filled(model, [6, 12, 15])
    generator, kept = torch.Generator().manual_seed(4), draw(3, 24, seed=5)
    at_B = torch.zeros(3, dtype=torch.long)
    for _ in range(6):
        tokens = kept.gather(1, at_B[:, None] + torch.arange(4))
        right_B = torch.randint(0, 5, (3,), generator=generator)
        is_right = torch.arange(4) < right_B[:, None]
        found = feed(model, seen, torch.where(is_right, tokens, 63 - tokens))
        seen.take_back(4 - right_B)
        at_B = at_B + right_B
        for step in range(4):
            said = model.decode(tokens[:, step], wanted, is_right[:, step].long())
            rows = is_right[:, step]
            torch.testing.assert_close(found[rows, step], said[rows], atol=2e-5, rtol=0)
    assert seen.length_B.tolist() == wanted.length_B.tolist()


def test_a_prompt_is_taken_back_too_and_other_chunks_follow(model: Any) -> None:
    ids = draw(1, 40, seed=6)
    seen, wanted = new_cache(model, 1, 6), new_cache(model, 1)
    model.prefill([ids[0, :21].tolist()], seen, [0])
    model.prefill([ids[0, :16].tolist()], wanted, [0])
    seen.take_back(5)
    part = [(63 - ids[0, 16:33]).tolist()]
    found = model.extend(part, seen, [0])
    torch.testing.assert_close(found, model.extend(part, wanted, [0]), atol=2e-5, rtol=0)
    step = draw(1, 9, seed=7)
    torch.testing.assert_close(
        feed(model, seen, step), feed(model, wanted, step), atol=2e-5, rtol=0
    )


def test_no_more_is_taken_back_than_is_kept(model: Any) -> None:
    cache = filled(model, [20, 3], num_spare=4)
    with pytest.raises(ValueError, match="row 1 would go back to -1 tokens"):
        cache.take_back(4)
    with pytest.raises(ValueError, match="row 0 would go back to 15 tokens, but it has been at 20"):
        cache.take_back(torch.tensor([5, 0]))
    cache.take_back(torch.tensor([3, 0]))
    feed(model, cache, draw(2, 1, seed=8))
    with pytest.raises(ValueError, match="it has been at 20 and the cache keeps 4"):
        cache.take_back(torch.tensor([3, 0]))  # 15: those keys are gone since 20
    cache.take_back(torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="0 or more"):
        cache.take_back(-1)
    assert cache.length_B.tolist() == [16, 4]


def test_a_slot_at_rest_keeps_what_it_has(model: Any) -> None:
    seen, wanted = filled(model, [15, 18], num_spare=3), filled(model, [15, 18], num_spare=3)
    feed(model, seen, draw(2, 5, seed=9), torch.tensor([1, 0]))
    seen.take_back(torch.tensor([0, 3]))
    wanted.take_back(torch.tensor([0, 3]))
    token_BS = draw(2, 6, seed=10)
    found, said = feed(model, seen, token_BS)[1], feed(model, wanted, token_BS)[1]
    torch.testing.assert_close(found, said, atol=2e-5, rtol=0)


@pytest.mark.parametrize("index", [[3, 1, 2, 0, 1, 1], [2]])
def test_rows_in_another_order_are_those_rows(model: Any, index: list[int]) -> None:
    cache, wanted = filled(model, [4, 11, 17, 26]), filled(model, [4, 11, 17, 26])
    cache.reorder_cache(torch.tensor(index))
    for token_B in draw(9, 4, seed=12):  # a row of `wanted` and its copies hear the same token
        found = model.decode(token_B[index], cache, torch.ones(len(index), dtype=torch.long))
        said = model.decode(token_B, wanted, torch.ones(4, dtype=torch.long))
        torch.testing.assert_close(found, said[index], atol=2e-5, rtol=0)


def test_repeated_selected_and_copied_rows(model: Any) -> None:
    one, two, three = (filled(model, [9, 14]) for _ in range(3))
    one.batch_repeat_interleave(2)
    two.reorder(torch.tensor([0, 0, 1, 1]))
    three.reorder(torch.tensor([0, 0, 1, 0]))
    three.copy_slots(torch.tensor([2]), torch.tensor([3]))
    token_BS = draw(4, 6, seed=13)
    wanted = feed(model, one, token_BS)
    assert torch.equal(feed(model, two, token_BS), wanted)
    assert torch.equal(feed(model, three, token_BS), wanted)
    three.batch_select_indices(torch.tensor([False, True, False, True]))
    assert three.length_B.tolist() == [15, 20]


def test_a_new_prompt_sees_nothing_of_the_old_row(model: Any) -> None:
    """The old row's numbers are NaN: had one of them a weight, even of zero, all would be."""
    cache, fresh = filled(model, [38, 21, 30], num_spare=2), new_cache(model, 3, 2)
    fresh.reserve(cache.capacity)
    tensors = [*cache.window_BWd]
    for stores in cache.stores:
        for store in stores.values():
            tensors += [store.kv_BRX, store.gate_BRX, store.entry_BEC]
    for x in tensors:
        x[1] = float("nan")
    cache.take_back(0)  # from here on it is known how far each row has been
    cache.release(torch.tensor([1]))
    prompt = draw(1, 5, seed=14).tolist()
    last = model.prefill(prompt, cache, [1])
    assert torch.equal(last, model.prefill(prompt, fresh, [1]))
    is_live = torch.tensor([0, 1, 0])
    for token_B in draw(9, 3, seed=15):
        found = model.decode(token_B, cache, is_live)[1]
        torch.testing.assert_close(found, model.decode(token_B, fresh, is_live)[1])
    cache.take_back(torch.tensor([0, 2, 0]))  # what the old row reached is forgotten too
    assert cache.length_B.tolist() == [38, 12, 30]


def test_reset_empties_every_slot(model: Any) -> None:
    cache = filled(model, [38, 21])
    cache.num_columns = 38
    cache.reset()
    assert cache.length_B.tolist() == [0, 0]
    assert cache.get_seq_length() == 0
    again, wanted = draw(2, 12, seed=16), new_cache(model, 2)
    wanted.reserve(38)
    assert torch.equal(feed(model, cache, again), feed(model, wanted, again))


def test_the_longest_row_is_bounded_without_looking(model: Any) -> None:
    cache = filled(model, [3, 9])
    cache.is_on_host = False
    assert cache.longest() == 9
    for step in range(3 * RECOUNT):
        cache.advance(torch.tensor([1, 0]))
        longest = int(cache.length_B.max())
        assert longest <= cache.longest() <= longest + min(step + 1, RECOUNT)
    cache.length_B[1] += 500
    assert cache.longest() == 509
    cache.length_B = torch.tensor([2, 7])
    assert cache.longest() == 7


def test_a_cache_that_may_not_look_gives_the_same(model: Any) -> None:
    cache, wanted = filled(model, [3, 9, 15]), filled(model, [3, 9, 15])
    cache.is_on_host = False
    token_BS, is_live_B = draw(3, 9, seed=17), torch.tensor([1, 0, 1])
    found = feed(model, cache, token_BS, is_live_B)
    torch.testing.assert_close(found, feed(model, wanted, token_BS, is_live_B), atol=2e-5, rtol=0)


def test_other_caches_contents_are_refused(model: Any) -> None:
    cache = new_cache(model, 2)
    with pytest.raises(NotImplementedError, match="filled by V4Model's layers"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    assert len(cache) == 3
    assert cache.batch_size == 2
    assert not cache.is_compileable
    assert not cache.is_croppable
    assert new_cache(model, 1, 1).is_croppable


def test_a_copied_row_goes_back_as_far_as_the_one_it_came_from(model: Any) -> None:
    cache = filled(model, [20, 30, 9], num_spare=4)
    cache.take_back(torch.tensor([3, 0, 0]))
    cache.copy_slots(torch.tensor([0, 2]), torch.tensor([2, 1]))  # 17 of 20; 9 where 30 were
    with pytest.raises(ValueError, match="row 2 would go back to 15 tokens, but it has been at 20"):
        cache.take_back(torch.tensor([0, 0, 2]))
    cache.take_back(torch.tensor([1, 4, 1]))
    assert cache.length_B.tolist() == [16, 5, 16]


def test_a_crop_takes_columns_off_every_row(model: Any) -> None:
    for columns in (0, 14):
        cache = filled(model, [9, 14], num_spare=4)
        cache.num_columns = columns
        cache.crop(-3)
        assert (cache.get_seq_length(), cache.length_B.tolist()) == (11, [6, 11])
        cache.crop(0)
        assert cache.get_seq_length() == 11
        with pytest.raises(ValueError, match="as a negative number"):
            cache.crop(3)
