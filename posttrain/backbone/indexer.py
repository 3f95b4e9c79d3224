"""The lightning indexer (V4 report 2.3.1 eqs. 13-17): the entries a CSA query attends to.

    score[t, e] = sum_h w[t, h] relu(q[t, h] . k[e]),   w = W x / sqrt(c heads)

The top-k visible entries stay; ties go to the lowest entry, so that prefill, decode and padded
runs choose alike. The choice has no gradient: the indexer learns from its own loss alone (V3.2
report 2.1), whose input is detached,

    loss = 1/T sum_t KL(p_t || softmax(score_t)) over the chosen entries of all T tokens,

p_t being the layer's attention, one softmax over window, entries and sink, summed over heads,
restricted to those entries and normalised once.

Legend: D documents, Q queries, E entries, K chosen ones, h heads, c head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.rope import rotate

BLOCK = 512
"""Entries scored at once where no gradient is wanted: a tile's products stay in the cache."""


@dataclass(frozen=True)
class Index:
    """The indexer's view of one group of documents."""

    query: Tensor
    """(D, L, h, c), rotated."""
    key: Tensor
    """(D, E, c)."""
    weight: Tensor
    """(D, L, h), scaled."""
    top_k: int
    wants_loss: bool

    def scores(self, first: int, end: int, num_entries: int) -> Tensor:
        """(D, Q, num_entries) without gradients, in blocks of entries."""
        with torch.no_grad():
            query, weight = self.query[:, first:end], self.weight[:, first:end]
            blocks = self.key[:, :num_entries].split(BLOCK, dim=1)
            return torch.cat([weigh(query, block, weight) for block in blocks], dim=-1)

    def zero_gradients(self) -> list[Tensor]:
        """Where the gradients of query, key and weight are gathered."""
        return [torch.zeros_like(x) for x in (self.query, self.key, self.weight)]


def queries(indexer: Any, q_latent: Tensor, rotation: Tensor) -> Tensor:
    """Indexer queries (..., heads, c) of tokens from their query latents (..., q_lora), rotated."""
    q = indexer.q_b_proj(q_latent).unflatten(-1, (indexer.num_heads, indexer.head_dim))
    return rotate(q, rotation.unsqueeze(-2))


def head_weights(indexer: Any, x: Tensor) -> Tensor:
    """The heads' weights (..., h) of tokens (..., H), scaled, at least float32."""
    scorer = indexer.scorer
    weight = scorer.weights_proj(x)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) * (scorer.weights_scaling * scorer.softmax_scale)


def weigh(query_DQhc: Tensor, key_DKc: Tensor, weight_DQh: Tensor) -> Tensor:
    """Scores (D, Q, K), at least float32."""
    wide = weight_DQh.dtype
    query, key = query_DQhc.to(wide), key_DKc.to(wide)
    similarity = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).relu()
    return (weight_DQh.unsqueeze(-2) @ similarity.unflatten(1, query.shape[1:3])).squeeze(-2)


def top_k_mask(score_DQE: Tensor, top_k: int) -> Tensor:
    """True for the `top_k` highest of each query; of equal ones the lowest entries."""
    if score_DQE.shape[-1] <= top_k:
        return torch.ones_like(score_DQE, dtype=torch.bool)
    least = score_DQE.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    is_above, is_tied = score_DQE > least, score_DQE == least
    room = top_k - is_above.sum(-1, keepdim=True)
    return is_above | (is_tied & (is_tied.cumsum(-1, dtype=torch.int32) <= room))


def top_k_numbers(score_DQE: Tensor, top_k: int) -> Tensor:
    """What `numbers` gives of `top_k_mask`, without the scores of -inf, and mostly without either:
    where no entry outside equals the last one inside, any top-k algorithm chooses the same."""
    best = score_DQE.topk(top_k, dim=-1, sorted=False)
    least = best.values.amin(-1, keepdim=True)
    if bool(((score_DQE >= least).sum(-1) > top_k).any()):
        return numbers(top_k_mask(score_DQE, top_k) & ~score_DQE.isneginf(), top_k)
    return best.indices.sort(dim=-1).values


def numbers(is_chosen_DQE: Tensor, top_k: int) -> Tensor:
    """The chosen entries' numbers in ascending order (D, Q, top_k) int64; -1 where there are
    fewer."""
    flat = is_chosen_DQE.flatten(0, 1)
    row, entry = flat.nonzero().unbind(-1)
    count = flat.sum(-1)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    found = torch.full((len(flat), top_k), -1, device=row.device)
    found[row, place] = entry
    return found.unflatten(0, is_chosen_DQE.shape[:2])


def loss(score_DQK: Tensor, share_DQhK: Tensor, mask: Tensor, has_query_DQ: Tensor) -> Tensor:
    """sum over queries of KL(p || softmax(score)), a scalar.

    Args:
        score_DQK: with gradients, if need be.
        share_DQhK: the attention's weights of the entries.
        mask: (D or 1, Q, K), the chosen entries.
        has_query_DQ: the queries that count.
    """
    target, logp_DQK = _target(share_DQhK), _logp(score_DQK, mask)
    kl_DQ = (torch.special.xlogy(target, target) - target * logp_DQK).sum(-1)
    return kl_DQ.masked_fill(~has_query_DQ, 0.0).sum()


def loss_gradient(
    score_DQK: Tensor, share_DQhK: Tensor, mask: Tensor, has_query_DQ: Tensor
) -> Tensor:
    """The gradient of `loss` to the scores (D, Q, K): softmax(score) - p."""
    grad = _logp(score_DQK, mask).exp() - _target(share_DQhK)
    return grad.masked_fill(~(mask & has_query_DQ.unsqueeze(-1)), 0.0)


def _target(share_DQhK: Tensor) -> Tensor:
    target = share_DQhK.detach().sum(2)
    return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)


def _logp(score_DQK: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(score_DQK.dtype).min
    return score_DQK.masked_fill(~mask, lowest).log_softmax(-1)
