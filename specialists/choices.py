"""What the sampler chose and the learner has to choose again: experts, and the tokens that top-p
and top-k left to sample from (DeepSeek-V3.2 report 3.1, keep routing and keep sampling mask).

Without the first an expert that rounding swapped makes the ratio noise; without the second the
learner's distribution is over tokens that could not have been sampled.

Legend: B rows, P prompt columns (padded on the left), C response columns (on the right), L layers,
k experts a token, V vocabulary, S the largest support, T real tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.routing import ExpertChoices
from posttrain.rollout.types import Rollout

ROUTES, SUPPORT = "routes", "support"
"""Fields by which they go through TRL, and keys of `tensors_of`."""


def fields_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Those that were recorded, one entry a rollout."""
    found: dict[str, list[Any]] = {}
    if any(rollout.routes is not None for rollout in rollouts):
        found[ROUTES] = [rollout.routes for rollout in rollouts]
    if any(rollout.support for rollout in rollouts):
        found[SUPPORT] = [rollout.support for rollout in rollouts]
    return found


def tensors_of(
    fields: dict[str, list[Any]], prompts: Sequence[Sequence[int]], responses: Sequence[Any]
) -> dict[str, Tensor]:
    """routes (B, P + C, L, k) int16 and support (B, C, S) int64, -1 where nothing was recorded."""
    num_p, num_c = max(map(len, prompts)), max(map(len, responses))
    found: dict[str, Tensor] = {}
    if routes := fields.get(ROUTES):
        _, num_layers, k = routes[0].shape
        padded = torch.full((len(prompts), num_p + num_c, num_layers, k), -1, dtype=torch.int16)
        for row, (prompt, one) in enumerate(zip(prompts, routes, strict=True)):
            first = num_p - len(prompt)
            padded[row, first : first + len(one)] = torch.as_tensor(one)
        found[ROUTES] = padded
    if supports := fields.get(SUPPORT):
        size = max(1, *(len(tokens) for support in supports for tokens in support))
        padded = torch.full((len(prompts), num_c, size), -1)
        for row, support in enumerate(supports):
            filled = [tokens + [-1] * (size - len(tokens)) for tokens in support]
            padded[row, : len(support)] = torch.tensor(filled)
        found[SUPPORT] = padded
    return found


def expert_choices(routes: Tensor, attention_mask: Tensor) -> ExpertChoices:
    """For the T real tokens of `routes` (B, P + C, L, k)."""
    return ExpertChoices(routes[attention_mask.bool()].permute(1, 0, 2))


def kept_logps(
    model: Any, ids: Tensor, attention_mask: Tensor, support: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p of the response's tokens (B, C) among those in `support` (B, C, S), which are all where
    it is empty, and the distributions' entropies (B, C), which have no gradient.

    Holds logits of (B, C, V).
    """
    num_c = support.shape[1]
    output = model(input_ids=ids, attention_mask=attention_mask, logits_to_keep=num_c + 1)
    logits = output.logits[:, :-1].float() / temperature
    left = logits.new_zeros((*logits.shape[:2], logits.shape[2] + 1), dtype=torch.bool)
    left.scatter_(2, torch.where(support < 0, logits.shape[2], support), value=True)
    left = left[..., :-1] | (support[..., :1] < 0)
    logp = logits.masked_fill(~left, float("-inf")).log_softmax(dim=-1)
    entropy = -(logp.detach().exp() * logp.detach().masked_fill(~left, 0.0)).sum(dim=-1)
    return logp.gather(2, ids[:, -num_c:, None]).squeeze(2), entropy
