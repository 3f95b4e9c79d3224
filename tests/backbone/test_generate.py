"""`generate` with a cache says what it says without one, and what one-by-one full forwards say."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor
from transformers import DynamicCache

from posttrain.backbone import V4Cache
from posttrain.backbone.presets import CSA, HCA, SLIDING

PAD = 2


def make_model(layer_types: Sequence[str] = (SLIDING, CSA, HCA), *, seed: int = 0) -> Any:
    """A small V4 whose window (7), top-k (3) and rates (4, 8) are shorter than the prompts, sure
    enough of its next token that rounding never decides."""
    few = {"n_routed_experts": 4, "index_topk": 3, "hc_sinkhorn_iters": 4}
    model = small_model(layer_types, seed=seed, **few).eval()
    model.lm_head.weight.data *= 20
    return model


def draw(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a full forward, pads after the end of sequence."""
    said: list[int] = []
    for _ in range(count):
        if 1 in said:
            said.append(PAD)
            continue
        said.append(int(model(torch.tensor([prompt + said])).logits[0, -1].argmax()))
    return said


LENGTHS = [9, 1, 17, 4]


@pytest.mark.parametrize("layers", [[SLIDING, CSA, HCA], [HCA, CSA]])
def test_greedy_equals_one_by_one_full_forwards_in_left_padded_rows(layers: list[str]) -> None:
    model, prompts = make_model(layers), draw(LENGTHS, seed=1)
    found = model.generate(**left_padded(prompts), max_new_tokens=12, do_sample=False)
    for row, prompt in zip(found[:, 17:].tolist(), prompts, strict=True):
        wanted = one_by_one(model, prompt, 12)
        assert row == wanted[: len(row)]
        assert all(token == PAD for token in wanted[len(row) :])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2, "temperature": 2.0},
    ],
    ids=["greedy", "beams", "samples", "sampled beams"],
)
def test_with_a_cache_is_as_without(options: dict[str, Any]) -> None:
    model, batch = make_model(), left_padded(draw(LENGTHS, seed=2))
    model.lm_head.weight.data /= 5  # so that beams and samples differ

    def run(*, use_cache: bool) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return model.generate(**batch, max_new_tokens=13, use_cache=use_cache, **options)

    assert torch.equal(run(use_cache=True), run(use_cache=False))


def test_the_cache_goes_on_from_call_to_call() -> None:
    model, prompts = make_model(), draw([11, 5], seed=4)
    batch = left_padded(prompts)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": VOCAB + 1}  # never ends
    first = model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, **options)
    cache = first.past_key_values
    assert isinstance(cache, V4Cache)
    assert cache.get_seq_length() == 11 + 6 - 1
    assert cache.length_B.tolist() == [11 + 5, 5 + 5]
    said = torch.tensor(draw([4, 4], seed=5))
    ids = torch.cat([first.sequences, said], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
    kept = copy.deepcopy(cache)
    again = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=7, **options
    )
    assert cache.get_seq_length() == kept.get_seq_length() + 4 + 7
    twice = model.generate(
        ids, attention_mask=mask, past_key_values=kept, max_new_tokens=7, **options
    )
    assert torch.equal(twice, again)
    wanted = model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=7, **options)
    assert torch.equal(again, wanted)


def test_generate_goes_on_from_rows_that_were_prefilled() -> None:
    model, prompts = make_model(), draw([12, 5], seed=12)
    batch = left_padded([[*p, 7] for p in prompts])
    cache = V4Cache(model.config, 2, like=model.lm_head.weight)
    model.model.prefill(prompts, cache, [0, 1])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    found = model.generate(**batch, past_key_values=cache, **options)
    assert torch.equal(found, model.generate(**batch, **options))


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_prompts_in_chunks_are_as_prompts_at_once(chunk: int) -> None:
    model, batch = make_model(), left_padded(draw(LENGTHS, seed=6))
    whole = model.generate(**batch, max_new_tokens=5, do_sample=False)
    parts = model.generate(**batch, max_new_tokens=5, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(parts, whole)


def test_drafts_from_the_prompt_change_nothing() -> None:
    model = make_model()
    (pattern,) = draw([5], seed=7)
    ids = torch.tensor([pattern * 4])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
    wanted = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), wanted)


def test_columns_in_any_pieces_give_the_logits_of_one_forward() -> None:
    model, prompts = make_model(), draw([20, 13, 0], seed=8)
    batch = left_padded(prompts)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask[0, 9:11] = 0  # a hole: the row's later tokens close up
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        cache, at, found = None, 0, list[Tensor]()
        for columns in (2, 1, 8, 1, 1, 7):
            out = model(
                ids[:, at : at + columns],
                attention_mask=mask[:, : at + columns],
                past_key_values=cache,
                use_cache=True,
            )
            cache, at = out.past_key_values, at + columns
            found.append(out.logits)
    logits = torch.cat(found, dim=1)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(logits / scale, wanted / scale, atol=2e-5, rtol=0)
    assert cache.length_B.tolist() == [18, 13, 0]
    assert torch.equal(logits[~mask.bool()], torch.zeros_like(logits[~mask.bool()]))


def test_embeddings_fill_a_cache_too() -> None:
    model, prompts = make_model(), draw([9], seed=9)
    ids = torch.tensor(prompts)
    embeds = model.model.embed_tokens(ids).detach()
    with torch.no_grad():
        wanted = model(ids).logits
        found = model(ids[:, :8], inputs_embeds=embeds[:, :8], use_cache=True)
        last = model(ids[:, 8:], inputs_embeds=embeds[:, 8:], past_key_values=found.past_key_values)
    logits = torch.cat([found.logits, last.logits], dim=1)
    torch.testing.assert_close(logits, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_gradients_flow_where_a_trainer_forgot_use_cache() -> None:
    model = make_model().train()
    out = model(torch.tensor(draw([6], seed=10)), use_cache=True)
    assert out.past_key_values is None
    out.logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_what_does_not_fit_is_named() -> None:
    model = make_model()
    ids = torch.tensor(draw([6, 6], seed=11))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache has 2 rows and the batch 1"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache has seen 6 columns and 1 are new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 4), past_key_values=cache)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="position_ids of row 1 do not count up by one"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="crop\\(2\\)"):
        cache.crop(2)
    other = DynamicCache()
    other.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="DynamicCache that holds tokens"):
        model(ids, past_key_values=other)
