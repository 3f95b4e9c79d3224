"""Greedy decoding two tokens at a time: the MTP block drafts one, the backbone checks it.

A row holds tokens 0..n-1; g = token n is known, d is the draft of token n + 1. One forward of
[g, d] gives a = token n + 1 and b = token n + 2, which counts if d = a. The block runs on the same
two tokens, reading [a, b], and drafts the next; where d was wrong both caches take one token back.
What comes out is what greedy decoding gives, up to ties within rounding.

Legend: B rows that still run, T their tokens, N streams, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.mtp import Observed, V4MTPBlock, mtp_config, observe


@dataclass
class Row:
    """One prompt's answer so far: `Row([4, 9, 2], num_checks=2)` took two checks for 3 tokens, the
    first of which the prompt gave."""

    tokens: list[int]
    num_checks: int = 0
    """Forwards of the backbone after the prompt's; tokens - 1 where no draft was right."""


class Speculator:
    """Rows of two caches, the backbone's and the block's, that go on together."""

    def __init__(self, model: Any, block: V4MTPBlock, num_rows: int) -> None:
        """Args: model: a V4ForCausalLM; block: its MTP block; num_rows: prompts at once."""
        self.model, self.block = model, block
        like = model.model.embed_tokens.weight
        self.cache = V4Cache(model.config, num_rows, like=like, num_spare=1)
        self.drafts = V4Cache(mtp_config(model.config), num_rows, like=like, num_spare=1)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Take whole prompts into all rows; each row's next token and the draft after it, (B,)."""
        device = self.drafts.length_B.device
        length_B = torch.tensor([len(ids) for ids in prompts], device=device)
        longest = int(length_B.max())
        ids_BS = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
        mask_BS = torch.arange(longest, device=device) < length_B[:, None]
        rows = torch.arange(len(prompts), device=device)
        self.cache.reserve(longest)
        seen = self._observe(ids_BS, rows, attention_mask=mask_BS)
        token_B = self._greedy(seen.hidden_BSH[rows, length_B - 1])
        last_B = length_B.cumsum(0) - 1
        following_T = ids_BS[mask_BS].roll(-1)
        following_T[last_B] = token_B
        draft_T = self._draft(seen, following_T)
        self._grow(rows, length_B)
        return token_B, draft_T[last_B]

    @torch.no_grad()
    def step(self, rows: Tensor, token_B: Tensor, draft_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check the drafts of these rows: the two tokens after `token_B` (B, 2), whether the second
        counts (B,), and the next draft (B,)."""
        self.cache.reserve(int(self.cache.length_B[rows].max()) + 2)
        seen = self._observe(torch.stack([token_B, draft_B], dim=1), rows)
        found_B2 = self._greedy(seen.hidden_BSH)
        is_right_B = found_B2[:, 0] == draft_B
        next_B2 = self._draft(seen, found_B2.flatten()).view(-1, 2)
        self._grow(rows, torch.full_like(rows, 2))
        back_B = torch.zeros_like(self.cache.length_B)
        back_B[rows] = (~is_right_B).to(back_B.dtype)
        self.cache.take_back(back_B)
        self.drafts.take_back(back_B)
        return found_B2, is_right_B, torch.where(is_right_B, next_B2[:, 1], next_B2[:, 0])

    def _observe(self, ids_BS: Tensor, rows: Tensor, **batch: Tensor) -> Observed:
        return observe(self.model.model, ids_BS, past_key_values=self.cache, slots=rows, **batch)

    def _greedy(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).argmax(dim=-1)

    def _draft(self, seen: Observed, following_T: Tensor) -> Tensor:
        """The token after `following_T`, (T,), from the streams of the one before it."""
        embed_TH = self.model.model.embed_tokens(following_T)
        own = dataclasses.replace(seen.context, cache=self.drafts)
        return self._greedy(self.block(seen.x_TNH, embed_TH, own))

    def _grow(self, rows: Tensor, count_B: Tensor) -> None:
        for cache in (self.cache, self.drafts):
            cache.length_B = cache.length_B.index_add(0, rows, count_B)


def generate(
    model: Any,
    block: V4MTPBlock,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> list[Row]:
    """Greedy answers to all prompts at once, each up to and with its first stop token.

    Raises:
        ValueError: a prompt without a token, or no token to generate.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: a prompt alone gives one, ask for 1")
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts {empty} have no token: begin them with the model's first one")
    if not prompts:
        return []
    speculator = Speculator(model, block, len(prompts))
    token_B, draft_B = speculator.start(prompts)
    rows = [Row([token]) for token in token_B.tolist()]

    def goes_on(row: Row) -> bool:
        return len(row.tokens) < max_new_tokens and row.tokens[-1] not in stop_ids

    while live := [i for i, row in enumerate(rows) if goes_on(row)]:
        slots = torch.tensor(live, device=token_B.device)
        found_B2, is_right_B, draft = speculator.step(slots, token_B[slots], draft_B[slots])
        token_B[slots] = torch.where(is_right_B, found_B2[:, 1], found_B2[:, 0])
        draft_B[slots] = draft
        for i, pair, is_right in zip(live, found_B2.tolist(), is_right_B.tolist(), strict=True):
            rows[i].num_checks += 1
            rows[i].tokens.append(pair[0])
            if is_right and goes_on(rows[i]):
                rows[i].tokens.append(pair[1])
    return rows
