"""Drafts change how many forwards greedy decoding takes, never what it says."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.mtp import V4MTPBlock, add_mtp, mtp_loss, observe
from posttrain.backbone.speculative import Speculator, generate

VOCAB = 23


def make(seed: int = 0) -> tuple[V4ForCausalLM, V4MTPBlock]:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "moe_intermediate_size": 16, "sliding_window": 6})
    config.hc_sinkhorn_iters = 4
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        block = add_mtp(model)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), block


def draw(lengths: Sequence[int], seed: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=source).tolist() for n in lengths]


@torch.no_grad()
def assert_greedy(model: V4ForCausalLM, prompt: list[int], answer: list[int]) -> None:
    """Each token is the likeliest after those before it, in one forward without a cache."""
    logits = model(torch.tensor([prompt + answer])).logits[0]
    assert answer == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


TEXT = torch.arange(32) * 5 % 7 + 3


@cache
def trained() -> tuple[V4ForCausalLM, V4MTPBlock]:
    """A model that knows TEXT, and a block whose drafts of it are right."""
    model, block = make()
    train(model, block, TEXT, steps=30)
    return model, block


def train(model: V4ForCausalLM, block: V4MTPBlock, ids: Tensor, steps: int) -> None:
    """Teach the backbone and the block a text, so that drafts are right."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        seen = observe(model.model, ids[None])
        main = F.cross_entropy(model.lm_head(seen.hidden_BSH)[0, :-1], ids[1:])
        shared: dict[str, Any] = {
            "embedding": model.model.embed_tokens,
            "head_VH": model.lm_head.weight,
        }
        weight = torch.full((len(ids),), 1 / len(ids))
        loss = main + mtp_loss(block, seen.x_TNH, ids, weight, seen.context, **shared)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_answers_are_those_of_greedy_decoding(seed: int) -> None:
    model, block = make(seed)
    prompts = draw([1, 9, 3, 17], seed=seed)
    rows = generate(model, block, prompts, max_new_tokens=16)
    for prompt, row in zip(prompts, rows, strict=True):
        assert len(row.tokens) == 16
        assert_greedy(model, prompt, row.tokens)
        assert 8 <= row.num_checks <= 15


def test_right_drafts_save_forwards_and_change_nothing() -> None:
    model, block = trained()
    prompts = [TEXT[:11].tolist(), TEXT[3:9].tolist(), *draw([5], seed=3)]
    rows = generate(model, block, prompts, max_new_tokens=21)
    for prompt, row in zip(prompts, rows, strict=True):
        assert_greedy(model, prompt, row.tokens)
    assert rows[0].num_checks <= 12  # 20 tokens after the first: 10 where every draft is right


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rows_stop_at_their_own_stop_token_and_at_the_limit(count: int) -> None:
    model, block = trained()
    prompts = [TEXT[i : i + 6].tolist() for i in range(4)]
    stop = int(TEXT[8])
    free = generate(model, block, prompts, max_new_tokens=count)
    rows = generate(model, block, prompts, max_new_tokens=count, stop_ids={stop})
    ends: set[int] = set()
    for row, unstopped in zip(rows, free, strict=True):
        assert len(unstopped.tokens) == count
        wanted = unstopped.tokens
        if stop in wanted:
            wanted = wanted[: wanted.index(stop) + 1]
        assert row.tokens == wanted
        ends.add(len(wanted))
    assert len(ends) > 1 or count == 1


def test_what_nothing_can_follow_is_refused() -> None:
    model, block = make()
    assert generate(model, block, [], max_new_tokens=3) == []
    with pytest.raises(ValueError, match=r"prompts \[1\] have no token"):
        generate(model, block, [[3, 4], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, block, [[3, 4]], max_new_tokens=0)


@torch.no_grad()
def test_the_block_drafts_with_a_cache_what_it_drafts_without() -> None:
    model, block = make()
    (prompt,) = draw([5], seed=9)
    speculator = Speculator(model, block, 1)
    token_B, draft_B = speculator.start([prompt])
    ids = [*prompt, int(token_B)]
    slots = torch.zeros(1, dtype=torch.long)
    num_right = 0
    for step in range(20):
        seen = observe(model.model, torch.tensor([ids[:-1]]))
        embed = model.model.embed_tokens(torch.tensor(ids[1:]))
        logits = model.lm_head(block(seen.x_TNH, embed, seen.context))[-1]
        assert int(draft_B) == int(logits.argmax())
        if step % 2:  # the right draft half of the time: both ways of going on are taken
            draft_B = model(torch.tensor([ids])).logits[0, -1:].argmax(dim=-1)
        found, is_right, draft_B = speculator.step(slots, token_B, draft_B)
        num_right += int(is_right)
        ids += found[0].tolist() if bool(is_right) else found[0, :1].tolist()
        token_B = torch.tensor(ids[-1:])
    assert 5 <= num_right < 20
    assert_greedy(model, prompt, ids[5:])
