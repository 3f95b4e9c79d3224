"""Rows to learn from, and the padded tensors that are made of them.

Shapes: B rows, S padded length, N loss tokens, n teachers of a row, Hi hidden size of teacher i.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from distill.hidden_store import HiddenRow
from posttrain.rollout.types import Rollout


@dataclass(frozen=True, slots=True)
class Example:
    """What the models read of one rollout: for the prompt [5, 9] and the response [4, 8, 2] whose
    8 is a tool's, `Example("math", {"math-teacher": 1.0}, input_ids=[5, 9, 4, 8],
    positions=[1, 3], sampled=[4, 2], sampler_logp=[-0.1, -0.7])`."""

    domain: str
    teachers: Mapping[str, float]
    """Who reads the row, and the weight of the KL to each."""

    input_ids: list[int]
    """Prompt and response, up to the last position that predicts an own token."""

    positions: list[int]
    """Where the student's own tokens are predicted: t - 1 for the token at t, prompt included."""

    sampled: list[int]
    """Those own tokens, one for each position."""

    sampler_logp: list[float]
    """What the sampler gave each of them, at its temperature."""

    by_teacher: bool = False
    """Whether a teacher sampled it: its numbers are logged apart."""

    is_warmup: bool = False
    """Whether it is learned by the forward KL, whatever the run minimises."""

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """In the order in which a micro-batch holds them."""
        return tuple(sorted(self.teachers))


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """An example and, by teacher, the last hidden states at its positions, [len(positions), Hi], or
    where they are."""

    example: Example
    teacher_hidden: Mapping[str, Tensor | HiddenRow]

    def hidden(self, teacher: str) -> Tensor:
        """The hidden states, mapped and not copied where another process made them."""
        found = self.teacher_hidden[teacher]
        return found.read() if isinstance(found, HiddenRow) else found


def example_from_rollout(
    rollout: Rollout,
    *,
    teachers: Mapping[str, float],
    is_warmup: bool = False,
    learned: slice | None = None,
) -> Example | None:
    """Of the `learned` tokens of the response, or all. None where they hold no own token: nothing
    can be learned from it."""
    start, places = len(rollout.prompt) - 1, range(len(rollout.response))
    positions = [start + t for t in places[learned or slice(None)] if rollout.is_own[t]]
    if not positions:
        return None
    token_ids = [*rollout.prompt, *rollout.response]
    sampled = [token_ids[position + 1] for position in positions]
    logp = [rollout.logp[position - start] for position in positions]
    input_ids = token_ids[: positions[-1] + 1]
    return Example(
        rollout.domain,
        teachers,
        input_ids,
        positions,
        sampled,
        logp,
        by_teacher=bool(rollout.sampled_by),
        is_warmup=is_warmup,
    )


def pad_right(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (B, S) int64; padding is token 0 under mask 0."""
    longest = max(len(ids) for ids in sequences)
    input_ids_BS = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    length_B = torch.tensor([len(ids) for ids in sequences])
    return input_ids_BS, (torch.arange(longest) < length_B[:, None]).long()


@dataclass(frozen=True, slots=True)
class Group:
    """The loss tokens of a micro-batch that the same teachers read."""

    teachers: tuple[str, ...]
    tokens: slice
    mixture_Nn: Tensor
    """Each teacher's weight at each of these tokens."""

    hidden: list[Tensor]
    """Each teacher's hidden states of these tokens, (N, Hi)."""

    is_warmup: bool = False
    """As in their examples; the same for all rows of a step."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that are in memory at once, right-padded, the rows of the same teachers side by side."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    position_N: Tensor
    """Index of each loss token's hidden state among the batch's, flattened to (B*S, H)."""

    sampled_N: Tensor
    """The loss tokens themselves."""

    sampler_logp_N: Tensor
    """What the sampler gave each of them, float64."""

    domain_N: Tensor
    """Index of each loss token's domain."""

    by_teacher_N: Tensor
    """Whether a teacher sampled the row of each loss token."""

    row_tokens_N: Tensor
    """Loss tokens in the row of each loss token."""

    groups: list[Group]

    @property
    def num_inputs(self) -> Tensor:
        """Tokens that the student reads, a scalar; the one of a batch without rows is none."""
        return self.attention_mask_BS.sum() * bool(self.groups)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same tensors on the device."""
        moved = [
            replace(
                group,
                mixture_Nn=group.mixture_Nn.to(device),
                hidden=[hidden.to(device) for hidden in group.hidden],
            )
            for group in self.groups
        ]
        return MicroBatch(
            self.input_ids_BS.to(device),
            self.attention_mask_BS.to(device),
            self.position_N.to(device),
            self.sampled_N.to(device),
            self.sampler_logp_N.to(device),
            self.domain_N.to(device),
            self.by_teacher_N.to(device),
            self.row_tokens_N.to(device),
            moved,
        )


def empty_microbatch() -> MicroBatch:
    """One token that nobody learns from: a rank without rows left takes part in the others'
    forwards and backwards."""
    one, none = torch.ones(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return MicroBatch(one, one, none, none, none.double(), none, none.bool(), none, [])


def make_microbatch(rows: Sequence[ScoredExample], *, domains: Sequence[str]) -> MicroBatch:
    """One micro-batch of rows that are sorted by teachers, whose hidden states are read now;
    `domains` gives each its index."""
    if not rows:
        return empty_microbatch()
    examples = [row.example for row in rows]
    input_ids_BS, attention_mask_BS = pad_right([example.input_ids for example in examples])
    width = input_ids_BS.shape[1]
    num_tokens = torch.tensor([len(example.positions) for example in examples])
    places = [b * width + p for b, example in enumerate(examples) for p in example.positions]
    domain_B = torch.tensor([domains.index(example.domain) for example in examples])
    by_teacher_B = torch.tensor([example.by_teacher for example in examples])
    return MicroBatch(
        input_ids_BS,
        attention_mask_BS,
        torch.tensor(places),
        torch.tensor([token for example in examples for token in example.sampled]),
        torch.tensor([p for e in examples for p in e.sampler_logp], dtype=torch.float64),
        domain_B.repeat_interleave(num_tokens),
        by_teacher_B.repeat_interleave(num_tokens),
        num_tokens.repeat_interleave(num_tokens),
        list(_groups(rows)),
    )


def _groups(rows: Sequence[ScoredExample]) -> Iterator[Group]:
    start = 0
    for names, found in groupby(rows, key=lambda row: row.example.teacher_names):
        group = list(found)
        mixture_Bn = torch.tensor([[row.example.teachers[name] for name in names] for row in group])
        num_tokens = torch.tensor([len(row.example.positions) for row in group])
        mixture_Nn = mixture_Bn.double().repeat_interleave(num_tokens, dim=0)
        hidden = [torch.cat([row.hidden(name) for row in group]) for name in names]
        tokens = slice(start, start + len(mixture_Nn))
        yield Group(names, tokens, mixture_Nn, hidden, group[0].example.is_warmup)
        start += len(mixture_Nn)


def cut_rows(
    rows: Sequence[ScoredExample], *, num_rows: int, num_tokens: int | None = None
) -> list[list[ScoredExample]]:
    """Each micro-batch's rows: all rows, at most `num_rows` and, padding included, `num_tokens`
    tokens at a time (one row may have more): sorted by teachers, so that each head is needed once,
    and by length, so that little is padded."""
    order = sorted(rows, key=lambda row: (row.example.teacher_names, len(row.example.input_ids)))
    parts: list[list[ScoredExample]] = []
    longest = 0
    for row in order:
        longest = max(longest, len(row.example.input_ids))
        size = len(parts[-1]) if parts else num_rows
        if size == num_rows or (num_tokens is not None and (size + 1) * longest > num_tokens):
            parts.append([])
            longest = len(row.example.input_ids)
        parts[-1].append(row)
    return parts
