"""What every token's KL weighs in the loss, from counts over the global batch.

    domain:    share_d / sum of shares of the domains present / (d's tokens)      (the default)
    token:     1 / (all tokens)
    sequence:  1 / (its row's tokens) / (all rows)

The weighted KLs then just add up: micro-batches, ranks and accumulation cannot change the sum.
Shapes: N tokens, D domains.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denominator = Literal["domain", "token", "sequence"]


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over all rows of a step, on all ranks."""

    tokens_D: Tensor
    """Loss tokens of each domain, (D,) float64."""

    num_rows: Tensor
    """Rows with a loss token, a scalar."""

    num_inputs: Tensor
    """Tokens that the student reads, prompts included, a scalar."""


def token_weights(
    denominator: Denominator,
    *,
    domain_N: Tensor,
    row_tokens_N: Tensor,
    share_D: Tensor,
    totals: Totals,
) -> Tensor:
    """The weight (N,) of each token, given its domain's index and its row's number of tokens."""
    if denominator == "token":
        return torch.ones_like(share_D)[domain_N] / totals.tokens_D.sum()
    if denominator == "sequence":
        return 1 / (row_tokens_N.to(share_D.dtype) * totals.num_rows)
    present_D = share_D * (totals.tokens_D > 0)
    return (present_D / present_D.sum() / totals.tokens_D.clamp(min=1))[domain_N]
