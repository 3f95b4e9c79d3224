"""Which positions are learned from, and what the models read."""

from dataclasses import replace

import torch

from distill.batch import Example, ScoredExample, example_from_rollout, microbatches, pad_right
from posttrain.rollout.types import Rollout

TOOL_TURN = Rollout(
    "p", "agent", version=0, prompt=[10, 11, 12], response=[20, 21, 30, 31, 22, 1],
    is_own=[True, True, False, False, True, True], logp=[0.0] * 6,
)  # fmt: skip


def test_positions_predict_own_tokens_listed_by_hand() -> None:
    # index:      0  1  2 | 3   4   5    6    7   8
    # token:      10 11 12| 20  21  30   31   22  1
    # own:                  yes yes tool tool yes yes (the stop token counts)
    # predicted at:         2   3             6   7
    example = example_from_rollout(TOOL_TURN, teacher="t")
    assert example == Example(
        "agent",
        "t",
        input_ids=[10, 11, 12, 20, 21, 30, 31, 22],
        positions=[2, 3, 6, 7],
        sampled=[20, 21, 22, 1],
    )


def test_what_follows_the_last_own_token_is_not_read() -> None:
    cut = replace(TOOL_TURN, response=[20, 1, 30], is_own=[True, True, False], logp=[0.0] * 3)
    example = example_from_rollout(cut, teacher="t")
    assert example == Example("agent", "t", [10, 11, 12, 20], positions=[2, 3], sampled=[20, 1])


def test_a_rollout_without_an_own_token_teaches_nothing() -> None:
    silent = replace(TOOL_TURN, response=[30], is_own=[False], logp=[0.0])
    assert example_from_rollout(silent, teacher="t") is None
    assert example_from_rollout(replace(silent, response=[], is_own=[]), teacher="t") is None


def test_padding_by_hand() -> None:
    ids, mask = pad_right([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_microbatch_by_hand() -> None:
    # sorted by teacher, then length: b's row comes last; width 3
    rows = [
        ScoredExample(Example("code", "b", [7], [0], [31]), torch.tensor([[4.0]])),
        ScoredExample(
            Example("agent", "a", [1, 2, 3], [1, 2], [3, 32]), torch.tensor([[2.0], [3.0]])
        ),
        ScoredExample(Example("code", "a", [9, 8], [1], [33]), torch.tensor([[1.0]])),
    ]
    (batch,) = microbatches(rows, num_rows=8, domains=["agent", "code"])
    assert batch.input_ids_BS.tolist() == [[9, 8, 0], [1, 2, 3], [7, 0, 0]]
    assert batch.position_N.tolist() == [1, 4, 5, 6]
    assert batch.sampled_N.tolist() == [33, 3, 32, 31]
    assert batch.domain_N.tolist() == [1, 0, 0, 1]
    assert batch.row_tokens_N.tolist() == [1, 2, 2, 1]
    assert [(name, tokens) for name, tokens, _ in batch.groups] == [
        ("a", slice(0, 3)),
        ("b", slice(3, 4)),
    ]
    assert [hidden.flatten().tolist() for _, _, hidden in batch.groups] == [[1.0, 2.0, 3.0], [4.0]]
