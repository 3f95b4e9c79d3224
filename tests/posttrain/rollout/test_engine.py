"""The engine says what one-by-one full forwards say, whatever its slots and neighbours."""

from typing import Any

import pytest
import torch

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.rollout import Request, Rollout
from posttrain.rollout.engine import Engine

VOCAB = 40


def make_model(*, window: int = 6) -> V4ForCausalLM:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update(
        {
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "sliding_window": window,
            "index_topk": 3,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = V4ForCausalLM(config)
        model.lm_head.weight.data *= 20  # confident enough that rounding never decides
    return model


def requests(count: int, *, temperature: float, max_new_tokens: int = 24) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [
        Request(
            prompt_id=f"p{i}",
            prompt=torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_token_ids=(1, 5),
        )
        for i, length in enumerate(lengths)
    ]


def run(model: V4ForCausalLM, asked: list[Request], num_slots: int = 4) -> dict[str, Rollout]:
    return {r.prompt_id: r for r in Engine(model, num_slots=num_slots, seed=0).run(asked)}


@pytest.mark.parametrize("window", [4, 128])
def test_greedy_equals_the_argmax_of_full_forwards_on_every_token(window: int) -> None:
    """Prompts within the window and past it, of a part of a chunk and of several; samples of each
    share its reading, some in slots at once and some after it."""
    model, generator = make_model(window=window), torch.Generator().manual_seed(2)
    prompts = {
        f"{length} tokens": torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for length in (1, 4, 5, 33, 127, 150)
    }
    asked = [
        Request(name, prompt, sample=n, max_new_tokens=20 - 3 * n, temperature=0.0)
        for name, prompt in prompts.items()
        for n in range(3)
    ]
    rollouts = list(Engine(model, num_slots=5, seed=0).run(asked))
    assert len(rollouts) == len(asked)
    for name, prompt in prompts.items():
        samples = sorted((r for r in rollouts if r.prompt_id == name), key=lambda r: r.sample)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + samples[0].response])).logits[0]
        wanted = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert [r.response for r in samples] == [wanted, wanted[:17], wanted[:14]]


def test_logprobs_are_those_of_the_full_forward() -> None:
    model = make_model()
    for rollout in run(model, requests(6, temperature=0.8)).values():
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt + rollout.response])).logits[0]
        logp = (logits[len(rollout.prompt) - 1 : -1].double() / 0.8).log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(rollout.response)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logp).double(), wanted, atol=1e-4, rtol=0)


def test_tokens_do_not_depend_on_slots_or_order() -> None:
    model, asked = make_model(), requests(11, temperature=1.0)
    wanted = run(model, asked, num_slots=11)
    for num_slots, order in [(1, asked), (3, asked[::-1]), (16, asked)]:
        found = run(model, order, num_slots)
        assert {k: r.response for k, r in found.items()} == {
            k: r.response for k, r in wanted.items()
        }


def test_samples_of_one_prompt_differ_and_repeat() -> None:
    model, base = make_model(), requests(1, temperature=1.0)[0]
    asked = [Request(base.prompt_id, base.prompt, sample=n, max_new_tokens=12) for n in range(6)]
    first = {r.sample: r.response for r in Engine(model, num_slots=4, seed=0).run(asked)}
    again = {r.sample: r.response for r in Engine(model, num_slots=4, seed=0).run(asked)}
    other = {r.sample: r.response for r in Engine(model, num_slots=4, seed=1).run(asked)}
    assert first == again
    assert first != other
    assert len({tuple(r) for r in first.values()}) > 1


def test_a_stop_token_is_kept_and_a_cut_is_named() -> None:
    for rollout in run(make_model(), requests(20, temperature=1.0, max_new_tokens=9)).values():
        stopped = rollout.response[-1] in (1, 5)
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert len(rollout.response) <= 9
        assert stopped or len(rollout.response) == 9
        assert not any(token in (1, 5) for token in rollout.response[:-1])


@pytest.mark.parametrize("said", [[7, 8, 9], [7, 5, 9]], ids=["words", "with a stop token"])
def test_what_a_tool_says_is_not_own_and_is_read_by_the_model(said: list[int]) -> None:
    model = make_model()
    turns: list[list[int]] = []

    def answer(own: list[int]) -> list[int] | None:
        turns.append(own)
        return said if len(turns) == 1 else None

    ask = Request(
        "t",
        [3, 4],
        max_new_tokens=400,
        temperature=1.0,
        stop_token_ids=(1, 5),
        continue_turn=answer,
    )
    (rollout,) = Engine(model, num_slots=2, seed=0).run([ask])
    first, second = turns
    assert rollout.response == [*first, *said, *second]
    assert rollout.is_own == [True] * len(first) + [False] * 3 + [True] * len(second)
    assert rollout.logp[len(first) : len(first) + 3] == [0.0, 0.0, 0.0]
    with torch.no_grad():
        logits = model(torch.tensor([rollout.prompt + rollout.response])).logits[0]
    logp = logits[len(rollout.prompt) - 1 : -1].double().log_softmax(-1)
    for index, (token, is_own) in enumerate(zip(rollout.response, rollout.is_own, strict=True)):
        if is_own:
            assert abs(float(logp[index, token]) - rollout.logp[index]) < 1e-4


def test_all_turns_are_told_where_that_is_asked_for() -> None:
    told: dict[bool, list[list[int]]] = {False: [], True: []}
    for all_turns, turns in told.items():

        def answer(own: list[int], turns: list[list[int]] = turns) -> list[int] | None:
            turns.append(own)
            return [7, 8] if len(turns) < 3 else None

        ask = Request(
            "t",
            [3, 4],
            max_new_tokens=200,
            stop_token_ids=tuple(range(0, VOCAB, 3)),
            continue_turn=answer,
            tells_all_turns=all_turns,
        )
        list(Engine(make_model(), num_slots=2, seed=0).run([ask]))
    first, second, third = told[False]
    assert told[True] == [first, first + second, first + second + third]


@pytest.mark.parametrize(("num_said", "length"), [(3, 5), (4, 1), (10, 1)])
def test_a_tool_answer_that_leaves_no_room_for_an_own_token_ends_the_row_by_length(
    num_said: int, length: int
) -> None:
    ask = Request(
        "t",
        [3, 4],
        max_new_tokens=5,
        stop_token_ids=tuple(range(VOCAB)),
        continue_turn=lambda _: [7] * num_said,
    )
    (rollout,) = Engine(make_model(), num_slots=1, seed=0).run([ask])
    assert rollout.finish_reason == "length"
    assert len(rollout.response) == length
    assert rollout.is_own[-1]


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_samples_in_eval_mode_and_is_left_as_it_was(is_training: bool) -> None:
    model = make_model().train(is_training)
    for abandoned in (False, True):
        rollouts: Any = Engine(model, num_slots=2, seed=0).run(requests(5, temperature=1.0))
        next(rollouts)
        assert not model.training
        if abandoned:
            rollouts.close()
        else:
            assert len(list(rollouts)) == 4
        assert model.training == is_training
