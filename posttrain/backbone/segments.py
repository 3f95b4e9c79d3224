"""Which tokens belong together: documents found from a mask and positions alone.

A batch reaches the model left padded (generation), right padded, with both in one row (GRPO),
packed with restarting positions (padding-free collators), or in any mix. All of them are one
thing: documents. The model runs its per-token work on the real tokens alone, flat, and its
attention on one document a row, right padded, where causality keeps the padding unseen. Documents
of very different lengths are laid out in groups of like ones, so that rows are at least half full.

Legend: B batch rows, S columns, T real tokens, D documents (of a group), L tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

SPREAD = 2
"""A group's longest document is less than so many times as long as its shortest."""


@dataclass(frozen=True)
class Rows:
    """A group of documents, one a row: lengths 3 and 2 give index [[0, 1, 2], [3, 4, 4]]."""

    document_D: Tensor
    """Which of the batch's documents they are."""
    length_D: Tensor
    start_D: Tensor | None
    """Tokens that the cache holds of each already; None: nowhere any."""
    index_DL: Tensor
    """The flat token at each place; places past a document's end repeat its last."""
    place_X: Tensor
    """Where this group's tokens stand in its flattened (D, L) rows, in the order of the batch."""
    is_full: bool
    """Every place is real and the group is the whole batch: layouts change by views alone."""

    @property
    def shape(self) -> tuple[int, int]:
        """(D, L)."""
        return cast("tuple[int, int]", tuple(self.index_DL.shape))

    def of(self, x: Tensor) -> Tensor:
        """(T, ...) as (D, L, ...), one document a row."""
        return x.view(*self.shape, *x.shape[1:]) if self.is_full else x[self.index_DL]

    def flat(self, x: Tensor) -> Tensor:
        """(D, L, ...) as (X, ...): the padding falls away."""
        return x.flatten(0, 1) if self.is_full else x.flatten(0, 1)[self.place_X]


@dataclass(frozen=True)
class Documents:
    """The documents of a batch: mask [[0, 1, 1], [1, 1, 1]] has two, of 2 and 3 tokens, T = 5."""

    token_T: Tensor
    """Where each real token stands in the flattened (B, S) batch."""
    document_T: Tensor
    position_T: Tensor
    """Its place in its own document, from 0: what RoPE, windows and compressors count."""
    length_D: Tensor
    """New tokens of each document."""
    groups: tuple[Rows, ...]
    order_T: Tensor | None
    """Where each token stands in the groups' tokens, one group after the other; None: there."""
    is_dense: bool
    """Every place of the batch is real and each of its rows is one document."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """One (D, L, ...) a group as (T, ...)."""
        flat = [rows.flat(part) for rows, part in zip(self.groups, parts, strict=True)]
        if self.order_T is None:
            return flat[0]
        return torch.cat(flat)[self.order_T]

    def to_batch(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """(T, ...) as (B, S, ...) in the caller's layout; zeros where there was padding."""
        if self.is_dense:
            return x.view(*shape, *x.shape[1:])
        batch = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        return batch.index_copy(0, self.token_T, x).view(*shape, *x.shape[1:])


def find_documents(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Documents:
    """The documents of a (B, S) batch.

    A document is a run of unmasked tokens in one row whose `position_ids`, where given, count up
    by one. Without a mask every token is real: then trailing pads at position 0 are documents of
    one token.

    Raises:
        ValueError: a mask or positions of another shape than the batch.
    """
    rows, columns = shape
    _check_shapes(shape, attention_mask, position_ids)
    if attention_mask is None:
        token_T = torch.arange(rows * columns, device=device)
    else:
        token_T = attention_mask.to(device).bool().flatten().nonzero().squeeze(1)
    row_T = token_T // max(columns, 1)
    starts_T = torch.ones_like(token_T, dtype=torch.bool)
    starts_T[1:] = row_T[1:] != row_T[:-1]
    if position_ids is not None:
        place_T = position_ids.to(device).expand(shape).flatten()[token_T]
        starts_T[1:] |= place_T[1:] != place_T[:-1] + 1
    return _documents(token_T, starts_T, shape)


def continued(documents: Documents, start_D: Tensor) -> Documents:
    """The same new tokens, after `start_D` (D,) tokens of each document that a cache holds."""
    return replace(
        documents,
        position_T=documents.position_T + start_D[documents.document_T],
        groups=tuple(replace(rows, start_D=start_D[rows.document_D]) for rows in documents.groups),
    )


def _documents(token_T: Tensor, starts_T: Tensor, shape: tuple[int, int]) -> Documents:
    num_tokens, device = token_T.numel(), token_T.device
    first_D = starts_T.nonzero().squeeze(1)
    length_D = torch.diff(first_D, append=first_D.new_tensor([num_tokens]))
    document_T = starts_T.cumsum(0) - 1
    position_T = torch.arange(num_tokens, device=device) - first_D[document_T]
    lengths = length_D.tolist()
    chosen = alike(lengths)
    if len(chosen) == 1:
        whole = torch.arange(len(lengths), device=device)
        is_full = len(set(lengths)) <= 1
        groups = (_rows(whole, first_D, length_D, document_T, position_T, is_full=is_full),)
        order_T, is_dense = None, is_full and (len(lengths), lengths[:1]) == (shape[0], [shape[1]])
    else:
        groups, order_T = _grouped(chosen, first_D, length_D, document_T, position_T)
        is_dense = False
    return Documents(token_T, document_T, position_T, length_D, groups, order_T, is_dense)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Groups of documents, longest first: one while padding to its longest at most doubles it."""
    num_tokens, longest = sum(lengths), max(lengths, default=0)
    if len(lengths) * longest <= SPREAD * num_tokens or not lengths:
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] * SPREAD > lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _grouped(
    chosen: list[list[int]],
    first_D: Tensor,
    length_D: Tensor,
    document_T: Tensor,
    position_T: Tensor,
) -> tuple[tuple[Rows, ...], Tensor]:
    """One Rows for each group, and where each token stands in their concatenation."""
    group_D = torch.empty_like(length_D)
    for number, members in enumerate(chosen):
        group_D[torch.tensor(members, device=length_D.device)] = number
    group_T = group_D[document_T]
    groups: list[Rows] = []
    for number in range(len(chosen)):
        document_X = (group_D == number).nonzero().squeeze(1)
        token_X = (group_T == number).nonzero().squeeze(1)
        row_X = torch.searchsorted(document_X, document_T[token_X])
        groups.append(
            _rows(
                document_X,
                first_D[document_X],
                length_D[document_X],
                row_X,
                position_T[token_X],
                is_full=False,
            )
        )
    return tuple(groups), torch.argsort(group_T, stable=True).argsort()


def _rows(
    document_D: Tensor,
    first_D: Tensor,
    length_D: Tensor,
    row_X: Tensor,
    position_X: Tensor,
    *,
    is_full: bool,
) -> Rows:
    longest = int(length_D.max()) if length_D.numel() else 0
    step_DL = torch.arange(longest, device=length_D.device).minimum(length_D[:, None] - 1)
    place_X = row_X * longest + position_X
    return Rows(document_D, length_D, None, first_D[:, None] + step_DL, place_X, is_full)


def _check_shapes(
    shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    if attention_mask is not None and tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} but input_ids are {shape}: give the "
            "batch's mask in 2-D (1 = token, 0 = padding); windows and documents follow from it"
        )
    if position_ids is not None and position_ids.shape[-1] != shape[1]:
        raise ValueError(f"position_ids are {tuple(position_ids.shape)} but input_ids are {shape}")
