"""Which positions are learned from, and what the models read."""

import random
from dataclasses import replace

import torch

from distill.batch import (
    Example,
    ScoredExample,
    cut_rows,
    example_from_rollout,
    make_microbatch,
    pad_right,
)
from posttrain.rollout.types import Rollout

TOOL_TURN = Rollout(
    "p", "agent", version=0, prompt=[10, 11, 12], response=[20, 21, 30, 31, 22, 1],
    is_own=[True, True, False, False, True, True], logp=[-0.1, -0.2, 0.0, 0.0, -0.3, -0.4],
)  # fmt: skip


def test_positions_predict_own_tokens_listed_by_hand() -> None:
    # index:      0  1  2 | 3   4   5    6    7   8
    # token:      10 11 12| 20  21  30   31   22  1
    # own:                  yes yes tool tool yes yes (the stop token counts)
    # predicted at:         2   3             6   7
    example = example_from_rollout(TOOL_TURN, teachers={"t": 1.0})
    assert example == Example(
        "agent",
        {"t": 1.0},
        input_ids=[10, 11, 12, 20, 21, 30, 31, 22],
        positions=[2, 3, 6, 7],
        sampled=[20, 21, 22, 1],
        sampler_logp=[-0.1, -0.2, -0.3, -0.4],
    )


def test_what_follows_the_last_own_token_is_not_read() -> None:
    logp = [-0.1, -0.2, 0.0]
    cut = replace(TOOL_TURN, response=[20, 1, 30], is_own=[True, True, False], logp=logp)
    example = example_from_rollout(cut, teachers={"t": 1.0})
    assert example == Example(
        "agent", {"t": 1.0}, [10, 11, 12, 20], [2, 3], sampled=[20, 1], sampler_logp=[-0.1, -0.2]
    )


def test_a_rollout_without_an_own_token_teaches_nothing() -> None:
    silent = replace(TOOL_TURN, response=[30], is_own=[False], logp=[0.0])
    assert example_from_rollout(silent, teachers={"t": 1.0}) is None
    assert (
        example_from_rollout(replace(silent, response=[], is_own=[]), teachers={"t": 1.0}) is None
    )


def test_padding_by_hand() -> None:
    ids, mask = pad_right([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def scored(
    domain: str,
    teachers: dict[str, float],
    input_ids: list[int],
    positions: list[int],
    *,
    sampled: list[int],
    hidden: dict[str, list[float]],
) -> ScoredExample:
    """A row whose teachers have hidden states of one number."""
    tensors = {name: torch.tensor(values)[:, None] for name, values in hidden.items()}
    logp = [-float(token) for token in sampled]
    example = Example(domain, teachers, input_ids, positions, sampled, logp)
    return ScoredExample(example, tensors)


def test_a_microbatch_by_hand() -> None:
    # sorted by teachers, then length: b's row comes last; width 3
    rows = [
        scored("code", {"b": 1.0}, [7], [0], sampled=[31], hidden={"b": [4.0]}),
        scored("agent", {"a": 1}, [1, 2, 3], [1, 2], sampled=[3, 32], hidden={"a": [2.0, 3.0]}),
        scored("code", {"a": 1.0}, [9, 8], [1], sampled=[33], hidden={"a": [1.0]}),
    ]
    (part,) = cut_rows(rows, num_rows=8)
    batch = make_microbatch(part, domains=["agent", "code"])
    assert batch.input_ids_BS.tolist() == [[9, 8, 0], [1, 2, 3], [7, 0, 0]]
    assert batch.position_N.tolist() == [1, 4, 5, 6]
    assert batch.sampled_N.tolist() == [33, 3, 32, 31]
    assert batch.sampler_logp_N.tolist() == [-33, -3, -32, -31]
    assert batch.domain_N.tolist() == [1, 0, 0, 1]
    assert batch.row_tokens_N.tolist() == [1, 2, 2, 1]
    assert [(group.teachers, group.tokens) for group in batch.groups] == [
        (("a",), slice(0, 3)),
        (("b",), slice(3, 4)),
    ]
    hidden = [[h.flatten().tolist() for h in group.hidden] for group in batch.groups]
    assert hidden == [[[1.0, 2.0, 3.0]], [[4.0]]]


def test_rows_of_the_same_teachers_form_one_group_whatever_their_weights() -> None:
    rows = [
        scored("code", {"b": 0.25, "a": 0.75}, [7], [0], sampled=[1], hidden={"a": [1], "b": [2]}),
        scored(
            "code", {"a": 0.5, "b": 0.5}, [7, 8], [0, 1], sampled=[1, 2],
            hidden={"a": [3, 4], "b": [5, 6]},
        ),
        scored("code", {"b": 1.0}, [7], [0], sampled=[1], hidden={"b": [7]}),
    ]  # fmt: skip
    (part,) = cut_rows(rows, num_rows=8)
    batch = make_microbatch(part, domains=["code"])
    both, alone = batch.groups
    assert (both.teachers, alone.teachers) == (("a", "b"), ("b",))
    assert both.mixture_Nn.tolist() == [[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]]
    assert [h.flatten().tolist() for h in both.hidden] == [[1, 3, 4], [2, 5, 6]]
    assert (alone.mixture_Nn.tolist(), alone.tokens) == ([[1.0]], slice(3, 4))


def test_no_microbatch_holds_more_tokens_than_it_may_and_no_row_is_lost() -> None:
    generator = random.Random(3)
    lengths = [generator.randint(1, 40) for _ in range(50)]
    rows = [
        scored("code", {f"t{i % 3}": 1.0}, [i] * n, [n - 1], sampled=[i], hidden={f"t{i % 3}": [i]})
        for i, n in enumerate(lengths)
    ]
    parts = cut_rows(rows, num_rows=6, num_tokens=64)
    cut = [make_microbatch(part, domains=["code"]) for part in parts]
    for batch in cut:
        assert len(batch.input_ids_BS) <= 6
        assert batch.input_ids_BS.numel() <= 64 or len(batch.input_ids_BS) == 1
    assert sorted(int(i) for batch in cut for i in batch.sampled_N) == list(range(50))
    names = [name for batch in cut for group in batch.groups for name in group.teachers]
    assert names == sorted(names)  # teacher-major: each head is needed once
