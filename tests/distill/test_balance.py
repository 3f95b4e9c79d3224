"""Token weights: shares by hand, and sums that do not depend on how a batch is cut."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from distill.balance import Denominator, Totals, token_weights

DOMAIN = torch.tensor([0, 0, 0, 2, 2, 0])
ROW_TOKENS = torch.tensor([3, 3, 3, 2, 2, 1])
SHARE = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
TOTALS = Totals(
    tokens_D=torch.tensor([4.0, 0.0, 2.0]).double(),
    num_rows=torch.tensor(3.0).double(),
    num_inputs=torch.tensor(9.0).double(),
)


def weights(denominator: Denominator, rows: slice = slice(None)) -> Tensor:
    return token_weights(
        denominator,
        domain_N=DOMAIN[rows],
        row_tokens_N=ROW_TOKENS[rows],
        share_D=SHARE,
        totals=TOTALS,
    )


@pytest.mark.parametrize(
    ("denominator", "wanted"),
    [
        # domain 1 is absent: shares 1 and 3 of 4, over 4 and 2 tokens
        ("domain", [1 / 16, 1 / 16, 1 / 16, 3 / 8, 3 / 8, 1 / 16]),
        ("token", [1 / 6] * 6),
        # three rows of 3, 2 and 1 tokens
        ("sequence", [1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6, 1 / 3]),
    ],
)
def test_weights_by_hand(denominator: Denominator, wanted: list[float]) -> None:
    torch.testing.assert_close(weights(denominator), torch.tensor(wanted).double())


@pytest.mark.parametrize("denominator", get_args(Denominator))
def test_all_weights_add_up_to_one(denominator: Denominator) -> None:
    torch.testing.assert_close(weights(denominator).sum(), torch.tensor(1.0).double())


def test_a_domain_has_its_share_of_the_weight_whatever_its_length() -> None:
    shares = torch.zeros(3).double().index_add_(0, DOMAIN, weights("domain"))
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.0, 0.75]).double())


@pytest.mark.parametrize("denominator", get_args(Denominator))
def test_a_part_of_the_batch_has_the_weights_it_has_in_the_whole(denominator: Denominator) -> None:
    parts = [weights(denominator, slice(i, i + 2)) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), weights(denominator))
