"""Experts taken down, or told, token by token on a cache: those of one forward over whole rows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

from posttrain.backbone import V4Cache
from posttrain.backbone.presets import CSA, HCA, SLIDING
from posttrain.backbone.routing import ExpertChoices, RouteTape, gates

LAYERS = 3
LENGTHS = [13, 1, 29]
"""Of the prompts; after them rows take 6, 2 and 4 tokens, then rest."""
STEPS = [6, 2, 4]


def make_model(seed: int = 0) -> Any:
    model = small_model((SLIDING, CSA, HCA), seed=seed, hc_sinkhorn_iters=2).eval()
    generator = torch.Generator().manual_seed(seed)
    for gate in gates(model)[1:]:
        gate.e_score_correction_bias.copy_(0.05 * torch.randn(8, generator=generator))
    return model


def draw(seed: int) -> list[Tensor]:
    """Three rows, prompt and answer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [n + m for n, m in zip(LENGTHS, STEPS, strict=True)]
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def whole_rows(model: Any, rows: Sequence[Tensor], **options: Any) -> list[ExpertChoices]:
    """What a forward over each row alone chooses."""
    return [model.model(row[None], capture_routes=True, **options).routes for row in rows]


def slots_and_tokens(rows: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
    """(B,) tokens of a step, and which slots are live."""
    live = torch.tensor([step < count for count in STEPS])
    place = [n + min(step, m - 1) for n, m in zip(LENGTHS, STEPS, strict=True)]
    return torch.stack([row[p] for row, p in zip(rows, place, strict=True)]), live


def rolled_out(
    model: Any, rows: Sequence[Tensor], chunk: int, tape: Callable[[int | None], RouteTape]
) -> list[ExpertChoices]:
    """The routes of each row from its prompt's prefill and one decode step after another; `tape`
    makes the tape of the prefill (None) and of each step."""
    cache = V4Cache(model.config, 3, like=model.lm_head.weight)
    prompts = [row[:n].tolist() for row, n in zip(rows, LENGTHS, strict=True)]
    taken = tape(None)
    model.model.prefill(prompts, cache, [0, 1, 2], chunk=chunk, tape=taken)
    found = [taken.choices]
    row_T = [torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))]
    for step in range(max(STEPS)):
        token_B, live = slots_and_tokens(rows, step)
        taken = tape(step)
        model.model.decode(token_B, cache, live.long(), tape=taken)
        found.append(taken.choices)
        row_T.append(live.nonzero().squeeze(1))
    expert_LTk = torch.cat([c.expert_LTk for c in found], dim=1)
    is_close_T = torch.cat([c.is_close_T for c in found if c.is_close_T is not None])
    row = torch.cat(row_T)
    return [ExpertChoices(expert_LTk[:, row == b], is_close_T[row == b]) for b in range(3)]


def check(found: Sequence[ExpertChoices], wanted: Sequence[ExpertChoices]) -> None:
    for ours, whole in zip(found, wanted, strict=True):
        assert ours.expert_LTk.shape == whole.expert_LTk.shape
        assert ours.is_close_T is not None
        assert whole.is_close_T is not None
        is_sure_T = ~(ours.is_close_T | whole.is_close_T)
        assert float(is_sure_T.float().mean()) > 0.9
        assert torch.equal(ours.expert_LTk[:, is_sure_T], whole.expert_LTk[:, is_sure_T])


@pytest.mark.parametrize("chunk", [3, 8192])
def test_prefill_and_decode_take_down_what_whole_rows_choose(chunk: int) -> None:
    model, rows = make_model(), draw(seed=1)
    found = rolled_out(model, rows, chunk, lambda _: RouteTape(LAYERS))
    check(found, whole_rows(model, rows))
    table = gates(model)[0].tid2eid
    assert all(torch.equal(c.expert_LTk[0], table[row]) for c, row in zip(found, rows, strict=True))


def test_prefill_and_decode_go_where_they_are_told() -> None:
    """Another model's routes: taken, and with them the hidden states of a forward that was told
    the same."""
    model, rows = make_model(), draw(seed=2)
    told = whole_rows(make_model(seed=1), rows)
    assert any(
        not torch.equal(a.expert_LTk, b.expert_LTk)
        for a, b in zip(told, whole_rows(model, rows), strict=True)
    )

    def tape(step: int | None) -> RouteTape:
        parts = [
            c.expert_LTk[:, :n] if step is None else c.expert_LTk[:, n + step : n + step + 1]
            for c, n in zip(told, LENGTHS, strict=True)
        ]
        return RouteTape(LAYERS, ExpertChoices(torch.cat(parts, dim=1)))

    found = rolled_out(model, rows, 5, tape)
    for ours, theirs in zip(found, told, strict=True):
        assert torch.equal(ours.expert_LTk, theirs.expert_LTk)
    cache = V4Cache(model.config, 1, like=model.lm_head.weight)
    with torch.no_grad():
        wanted = model.model(rows[2][None], replay_routes=told[2]).last_hidden_state[0]
    first = RouteTape(LAYERS, ExpertChoices(told[2].expert_LTk[:, :-1]))
    model.model.prefill([rows[2][:-1].tolist()], cache, [0], chunk=7, tape=first)
    last = RouteTape(LAYERS, ExpertChoices(told[2].expert_LTk[:, -1:]))
    hidden = model.model.decode(rows[2][-1:], cache, torch.ones(1, dtype=torch.long), tape=last)
    torch.testing.assert_close(hidden[0], wanted[-1], atol=2e-5, rtol=0)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Left padded ids and mask (B, S)."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0), value=2) for r in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(r)).long() for r in rows])
    return ids, mask


def in_columns(model: Any, ids: Tensor, mask: Tensor, **wanted: Any) -> list[Any]:
    """A cached forward of all but the last five columns, and then of one column after another."""
    cache, at, found = None, 0, list[Any]()
    for columns in (ids.shape[1] - 5, 1, 1, 1, 1, 1):
        told = {name: give(at, at + columns) for name, give in wanted.items()}
        out = model(
            ids[:, at : at + columns],
            attention_mask=mask[:, : at + columns],
            past_key_values=cache,
            use_cache=True,
            **told,
        )
        cache, at = out.past_key_values, at + columns
        found.append(out)
    return found


@torch.no_grad()
def test_a_cached_forward_gives_the_routes_and_streams_of_its_columns() -> None:
    model, (ids, mask) = make_model(), padded(draw(seed=3))
    mask[1, -2] = 0  # a row that rests in one step
    whole = model(ids, attention_mask=mask, capture_routes=True, output_hidden_states=True)
    yes = lambda *_: True  # noqa: E731
    found = in_columns(model, ids, mask, capture_routes=yes)
    expert_BSLk = torch.full((*ids.shape, LAYERS, 2), -1)
    expert_BSLk[mask.bool()] = whole.routes.expert_LTk.transpose(0, 1)
    close_BS = torch.zeros_like(mask, dtype=torch.bool)
    close_BS[mask.bool()] = whole.routes.is_close_T
    at = 0
    for out, columns in zip(found, (ids.shape[1] - 5, 1, 1, 1, 1, 1), strict=True):
        span = slice(at, at + columns)
        real = mask[:, span].bool()
        sure = ~(out.routes.is_close_T | close_BS[:, span][real])
        got = out.routes.expert_LTk.transpose(0, 1)
        assert torch.equal(got[sure], expert_BSLk[:, span][real][sure])
        at += columns
    streams = in_columns(model, ids, mask, output_hidden_states=yes)
    for i, wanted in enumerate(whole.hidden_states):
        got = torch.cat([out.hidden_states[i] for out in streams], dim=1)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)
    assert found[0].hidden_states is None
    assert streams[0].routes is None


@torch.no_grad()
def test_a_cached_forward_goes_where_it_is_told() -> None:
    model, (ids, mask) = make_model(), padded(draw(seed=4))
    mask[2, -1] = 0
    told = make_model(seed=1)(ids, attention_mask=mask, capture_routes=True).routes
    wanted = model(ids, attention_mask=mask, replay_routes=told).logits
    expert_BSLk = torch.full((*ids.shape, LAYERS, 2), -1)
    expert_BSLk[mask.bool()] = told.expert_LTk.transpose(0, 1)

    def part(first: int, end: int) -> ExpertChoices:
        real = mask[:, first:end].bool()
        return ExpertChoices(expert_BSLk[:, first:end][real].transpose(0, 1))

    found = torch.cat([o.logits for o in in_columns(model, ids, mask, replay_routes=part)], dim=1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_tape_of_another_step_is_named() -> None:
    model, live = make_model(), torch.tensor([1, 0, 1])
    cache = V4Cache(model.config, 3, like=model.lm_head.weight)
    tape, token_B = RouteTape(LAYERS), torch.tensor([5, 6, 7])
    model.model.decode(token_B, cache, live, tape=tape)
    assert tape.choices.expert_LTk.shape == (LAYERS, 2, 2)
    with pytest.raises(ValueError, match="a RouteTape takes one call"):
        model.model.decode(token_B, cache, live, tape=tape)
    told = RouteTape(LAYERS, ExpertChoices(torch.zeros(LAYERS, 3, 2, dtype=torch.long)))
    with pytest.raises(ValueError, match="of 3 tokens, the step has 2 live slots of 3"):
        model.model.decode(token_B, cache, live, tape=told)
