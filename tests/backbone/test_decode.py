"""One token a slot: the same keys, the same choice, the same logits as in the full forward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

from posttrain.backbone import V4Cache, decode, decode_keys, indexer, rope
from posttrain.backbone.cache import CompressedStore
from posttrain.backbone.compiled import compiled_decode
from posttrain.backbone.presets import CSA, HCA, SLIDING
from posttrain.backbone.routing import ExpertChoices, RouteTape


def make_model(layer_types: Sequence[str] = (SLIDING, CSA, HCA), **changes: Any) -> Any:
    """Window 7, top-k 2, rates 4 and 8: seventy tokens have more than 8 x top-k entries."""
    few = {"n_routed_experts": 4, "index_topk": 2, "hc_sinkhorn_iters": 2}
    return small_model(layer_types, **{**few, **changes}).eval()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def filled(model: Any, ids: Tensor, lengths: Sequence[int], num_spare: int = 0) -> V4Cache:
    like = model.model.embed_tokens.weight
    cache = V4Cache(model.config, len(lengths), like=like, num_spare=num_spare)
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    model.model.prefill(prompts, cache, list(range(len(lengths))))
    return cache


LIVE = torch.ones(3, dtype=torch.long)


@pytest.mark.parametrize("num_spare", [0, 5])
def test_long_rows_decode_as_the_full_forward(num_spare: int) -> None:
    model, ids = make_model(), draw(3, 86, seed=1)
    lengths = [78, 9, 70]
    cache = filled(model, ids, lengths, num_spare)
    with torch.no_grad():
        wanted = model(ids).logits
    for step in range(8):
        at = torch.tensor(lengths) + step
        hidden = model.model.decode(ids[torch.arange(3), at], cache, LIVE)
        said = wanted[torch.arange(3), at]
        torch.testing.assert_close(model.lm_head(hidden), said, atol=2e-5, rtol=0)


@pytest.mark.parametrize("top_k", [1, 5, 16])
def test_chosen_entries_are_those_that_a_mask_would_leave(top_k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    entry, score = (torch.randn(3, *shape, generator=generator) for shape in ((96, 6), (96,)))
    q, sink = torch.randn(3, 4, 6, generator=generator), torch.randn(4, generator=generator)
    is_hidden = torch.arange(96) >= torch.tensor([0, 4, 90])[:, None]
    store = CompressedStore(3, 6, 4, is_overlapping=False, like=entry)
    store.entry_BEC = entry
    found = decode_keys.chosen(score.clone(), store, torch.arange(3), is_hidden, top_k)
    score = score.masked_fill(is_hidden, float("-inf"))
    is_chosen = indexer.top_k_mask(score, top_k) & ~is_hidden
    masked = decode_keys.bias_of(~is_chosen, torch.float32)
    out, wanted = (
        decode_keys.attend(q, [pair], sink, 0.3)
        for pair in ((found.key, found.bias), (entry, masked))
    )
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)


def test_room_grows_by_itself() -> None:
    model, ids = make_model(), draw(1, 30, seed=4)
    cache = V4Cache(model.config, 1, like=model.model.embed_tokens.weight)
    with torch.inference_mode():
        found = [model.model.decode(t, cache, LIVE[:1]) for t in ids.T]
        wanted = model(ids).logits[0]
        torch.testing.assert_close(model.lm_head(torch.cat(found)), wanted, atol=2e-5, rtol=0)


def test_what_a_step_leaves_can_be_gone_on_from_and_trained_on() -> None:
    """The step runs in inference mode; nothing that outlives it may be of that mode."""
    model, ids = make_model(), draw(2, 30, seed=11)
    cache = V4Cache(model.config, 2, like=model.model.embed_tokens.weight, num_spare=1)
    tapes = [RouteTape(3) for _ in range(9)]
    said = [  # room grows on the way
        model.model.decode(token_B, cache, LIVE[:2], tape=tape)
        for token_B, tape in zip(ids[:, :9].T, tapes, strict=True)
    ]
    cache.take_back(1)
    model.model.extend(ids[:, 8:14].tolist(), cache, [0, 1])  # within that room
    cache.release(torch.tensor([1]))
    found = model.model.decode(ids[:, 14], cache, torch.tensor([1, 0]))
    with torch.no_grad():
        wanted = model.model(ids[:1, :15]).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], wanted, atol=2e-5, rtol=0)
    model.lm_head(said[-1]).sum().backward()
    first = ExpertChoices(torch.cat([tape.choices.expert_LTk[:, :1] for tape in tapes], dim=1))
    model.model(ids[:1, :9], replay_routes=first).last_hidden_state.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("num_entries", [1, 5, 63, 64, 65, 300, 1000, 4097])
@pytest.mark.parametrize("top_k", [1, 3, 32])
def test_the_best_are_the_first_of_a_stable_sort(num_entries: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(num_entries + top_k)
    for spread in (2, 1000):  # two values alone: nearly all are ties
        score = torch.randint(-spread, spread, (3, num_entries), generator=generator) / 7.0
        score[0, num_entries // 3 :] = float("-inf")
        score[1, ::2] = -0.0
        score[1, 1::2] = 0.0
        wanted = score.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        found = decode_keys.best(score, top_k)
        assert torch.equal(found.sort(dim=-1).values, wanted.sort(dim=-1).values)


def test_ranks_order_floats_of_every_kind() -> None:
    generator = torch.Generator().manual_seed(5)
    score = torch.randn(1, 200, generator=generator) * 10.0 ** torch.arange(-100, 100)
    score = torch.cat([score, torch.tensor([[0.0, -0.0, float("inf"), float("-inf")]])], dim=1)
    wanted = score.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(decode_keys.ranks(score).sort(dim=-1, descending=True).indices, wanted)


def test_scores_in_blocks_are_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_keys, "SCORES_AT_ONCE", 1)
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 5, 8, generator=generator)
    key = torch.randn(2, 2100, 8, generator=generator)
    weight = torch.randn(2, 5, generator=generator)
    similarity = torch.einsum("bhc,bec->bhe", q.double(), key.double()).relu()
    wanted = torch.einsum("bhe,bh->be", similarity, weight.double())
    found = decode_keys.scores(q, key, weight)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_one_softmax_over_all_keys_and_the_sink() -> None:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(3, 4, 6, generator=generator)
    keys = [torch.randn(3, n, 6, generator=generator) for n in (5, 11)]
    sees = [torch.rand(3, n, generator=generator) < 0.5 for n in (5, 11)]
    sink = torch.randn(4, generator=generator)
    pairs = [(k, decode_keys.bias_of(~s, torch.float32)) for k, s in zip(keys, sees, strict=True)]
    all_keys, all_sees = torch.cat(keys, 1).double(), torch.cat(sees, 1)
    weight = (q.double() @ all_keys.mT * 0.3).exp() * all_sees[:, None]
    weight = weight / (weight.sum(-1, keepdim=True) + sink.double().exp()[:, None])
    found = decode_keys.attend(q, pairs, sink, 0.3)
    torch.testing.assert_close(found.double(), weight @ all_keys, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_real", [False, True])
def test_a_turn_in_place_is_ropes(dtype: torch.dtype, *, is_real: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(5, 3, 12, generator=generator).to(dtype)
    inv_freq, position = torch.rand(4, generator=generator), torch.arange(5) * 31
    turn = rope.rotations(inv_freq, position, 1.0)
    wanted = rope.rotate(x, turn.unsqueeze(1))
    rotation = decode.rotations(inv_freq, position, 1.0, is_real=is_real)
    found = decode.rotate(x.clone(), rotation)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    back = decode.rotate(found.clone(), rotation, back=True)
    torch.testing.assert_close(back, x, atol=2 * tolerance, rtol=2 * tolerance)
    assert torch.equal(found[..., :4], x[..., :4])


# dynamo makes an instance of each autograd function, which torch itself deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_whole_step_is_one_graph() -> None:
    """fullgraph: nothing in the step looks at a value, for a look would break the graph."""
    torch.compiler.reset()
    model, ids = make_model([CSA, HCA], hc_sinkhorn_iters=1), draw(3, 120, seed=9)
    compiled = compiled_decode(model.model, backend="aot_eager")
    caches = [filled(model, ids, lengths, 2) for lengths in ([70, 7, 33], [5, 80, 1])]
    copies = [filled(model, ids, lengths, 2) for lengths in ([70, 7, 33], [5, 80, 1])]
    for cache in (*caches, *copies):
        cache.reserve(160)
    for cache, copy in zip(caches, copies, strict=True):
        for step in range(6):
            if step == 4:
                cache.take_back(2)
                copy.take_back(2)
            live = torch.tensor([1, 1, step % 2])
            found = compiled(ids[:, step], cache, live)
            wanted = model.model.decode(ids[:, step], copy, live)
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
            assert torch.equal(cache.length_B, copy.length_B)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(ids[:, 7], cache, LIVE)


def test_bf16_rows_decode_near_the_full_forward() -> None:
    model, ids = make_model([SLIDING, HCA]).to(torch.bfloat16), draw(3, 40, seed=10)
    cache = filled(model, ids, [30, 17, 24])
    assert cache.window_BWd[0].dtype == torch.bfloat16
    with torch.no_grad():
        wanted = model(ids).logits
        for step in range(5):
            at = torch.tensor([30, 17, 24]) + step
            found = model.lm_head(model.model.decode(ids[torch.arange(3), at], cache, LIVE))
            said = wanted[torch.arange(3), at]
            error_B = (found - said).float().norm(dim=1) / said.float().norm(dim=1)
            assert error_B.median() < 0.02  # a row may be routed otherwise
