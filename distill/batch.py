"""Rows to learn from, and the padded tensors that are made of them.

Shapes: B rows, S padded length, N loss tokens, H hidden size of a row's teacher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from posttrain.rollout.types import Rollout


@dataclass(frozen=True, slots=True)
class Example:
    """What the models read of one rollout: for the prompt [5, 9] and the response [4, 8, 2] whose
    8 is a tool's, `Example("math", "math-teacher", input_ids=[5, 9, 4, 8], positions=[1, 3],
    sampled=[4, 2])`."""

    domain: str
    teacher: str
    input_ids: list[int]
    """Prompt and response, up to the last position that predicts an own token."""

    positions: list[int]
    """Where the student's own tokens are predicted: t - 1 for the token at t, prompt included."""

    sampled: list[int]
    """Those own tokens, one for each position."""


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """An example and its teacher's last hidden states at its positions, [len(positions), H]."""

    example: Example
    teacher_hidden: Tensor


def example_from_rollout(rollout: Rollout, *, teacher: str) -> Example | None:
    """None where the rollout holds no own token: nothing can be learned from it."""
    start = len(rollout.prompt) - 1
    positions = [start + t for t, is_own in enumerate(rollout.is_own) if is_own]
    if not positions:
        return None
    token_ids = [*rollout.prompt, *rollout.response]
    sampled = [token_ids[position + 1] for position in positions]
    return Example(rollout.domain, teacher, token_ids[: positions[-1] + 1], positions, sampled)


def pad_right(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, S) int64; padding is token 0 under mask 0."""
    longest = max(len(ids) for ids in sequences)
    input_ids_BS = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    length_B = torch.tensor([len(ids) for ids in sequences])
    return input_ids_BS, (torch.arange(longest) < length_B[:, None]).long()


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that are in memory at once, right-padded, the rows of one teacher side by side."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_N: Tensor
    """Index of each loss token's hidden state among the batch's, flattened to (B*S, H)."""

    sampled_N: Tensor
    """The loss tokens themselves."""

    domain_N: Tensor
    """Index of each loss token's domain."""

    row_tokens_N: Tensor
    """Loss tokens in the row of each loss token."""

    groups: list[tuple[str, slice, Tensor]]
    """One for each teacher: its name, its loss tokens and its hidden states of them."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same tensors on the device."""
        return MicroBatch(
            self.input_ids_BS.to(device),
            self.attention_mask_BS.to(device),
            self.position_N.to(device),
            self.sampled_N.to(device),
            self.domain_N.to(device),
            self.row_tokens_N.to(device),
            [(name, tokens, hidden.to(device)) for name, tokens, hidden in self.groups],
        )


def make_microbatch(rows: Sequence[ScoredExample], *, domains: Sequence[str]) -> MicroBatch:
    """One micro-batch of rows that are sorted by teacher; `domains` gives each domain its index."""
    examples = [row.example for row in rows]
    input_ids_BS, attention_mask_BS = pad_right([example.input_ids for example in examples])
    width = input_ids_BS.shape[1]
    num_tokens = torch.tensor([len(example.positions) for example in examples])
    places = [b * width + p for b, example in enumerate(examples) for p in example.positions]
    domain_B = torch.tensor([domains.index(example.domain) for example in examples])
    groups: list[tuple[str, slice, Tensor]] = []
    start = 0
    for name, group in groupby(rows, key=lambda row: row.example.teacher):
        hidden_NH = torch.cat([row.teacher_hidden for row in group])
        groups.append((name, slice(start, start + len(hidden_NH)), hidden_NH))
        start += len(hidden_NH)
    return MicroBatch(
        input_ids_BS,
        attention_mask_BS,
        torch.tensor(places),
        torch.tensor([token for example in examples for token in example.sampled]),
        domain_B.repeat_interleave(num_tokens),
        num_tokens.repeat_interleave(num_tokens),
        groups,
    )


def microbatches(
    rows: Sequence[ScoredExample], *, num_rows: int, domains: Sequence[str]
) -> Iterator[MicroBatch]:
    """All rows, `num_rows` at a time: sorted by teacher, so that each head is needed once, and by
    length, so that little is padded."""
    order = sorted(rows, key=lambda row: (row.example.teacher, len(row.example.input_ids)))
    for start in range(0, len(order), num_rows):
        yield make_microbatch(order[start : start + num_rows], domains=domains)
