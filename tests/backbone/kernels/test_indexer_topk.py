"""The indexer's kernel chooses what a stable sort of all scores would, ties to the lowest entry."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone.kernels import indexer_topk as kernel

Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(
    shape: tuple[int, int, int, int], device: torch.device, *, whole: bool, seed: int = 0
) -> Problem:
    """Queries, weights, keys, and ranges of entries of two documents' worth of queries. `whole`
    numbers are added without rounding, so ties are true ties and many."""
    tokens, heads, size, entries = shape
    generator = torch.Generator().manual_seed(seed)

    def numbers(*sizes: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, sizes, generator=generator).float()
        return torch.randn(sizes, generator=generator)

    first = torch.zeros(tokens, dtype=torch.int32)
    first[tokens // 2 :] = entries // 3
    count = torch.randint(0, entries - entries // 3 + 1, (tokens,), generator=generator).int()
    parts = (numbers(tokens, heads, size), numbers(tokens, heads), numbers(entries, size))
    q, weight, key, first, count = (x.to(device) for x in (*parts, first, count))
    return q, weight, key, first, count


def choose(p: Problem, top_k: int) -> Tensor:
    return kernel.top_entries(*p, top_k=top_k, most_visible=max(int(p[-1].max()), 1))


@pytest.mark.parametrize("top_k", [1, 5, 16])
@pytest.mark.parametrize("shape", [(6, 2, 3, 30), (4, 17, 20, 90), (3, 1, 16, 7)])
def test_whole_numbers_with_many_ties(
    shape: tuple[int, int, int, int], top_k: int, device: torch.device
) -> None:
    problem = draw(shape, device, whole=True)
    assert torch.equal(choose(problem, top_k), kernel.reference(*problem, top_k))


@pytest.mark.parametrize("shape", [(5, 16, 24, 50), (3, 65, 130, 80)])
def test_random_numbers(shape: tuple[int, int, int, int], device: torch.device) -> None:
    problem = q, weight, key, first, count = draw(shape, device, whole=False)
    wanted = kernel.reference(q.double(), weight.double(), key.double(), first, count, 6)
    assert torch.equal(choose(problem, 6), wanted)


def test_bfloat16_products_are_exact(device: torch.device) -> None:
    q, weight, key, first, count = draw((5, 16, 24, 50), device, whole=True, seed=1)
    problem = (q.bfloat16(), weight, key.bfloat16(), first, count)
    wanted = kernel.reference(q, weight, key, first, count, 7)
    assert torch.equal(choose(problem, 7), wanted)


def test_all_scores_equal_choose_the_first_entries(device: torch.device) -> None:
    # relu gives 0 everywhere, and negative weights make some of the zeros -0
    q, key = torch.ones(2, 3, 4, device=device), -torch.ones(9, 4, device=device)
    weight = torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, 2.0]], device=device)
    first = torch.tensor([2, 0], dtype=torch.int32, device=device)
    count = torch.tensor([7, 3], dtype=torch.int32, device=device)
    chosen = kernel.top_entries(q, weight, key, first, count, top_k=4, most_visible=7)
    assert chosen.tolist() == [[2, 3, 4, 5], [0, 1, 2, -1]]


def test_negative_scores_are_ordered_too(device: torch.device) -> None:
    # scores -1 -4 -2 -3: the best two are entries 0 and 2
    key = torch.tensor([[1.0], [4.0], [2.0], [3.0]], device=device)
    one = torch.ones(1, 1, device=device)
    count = torch.full((1,), 4, dtype=torch.int32, device=device)
    chosen = kernel.top_entries(
        one[..., None], -one, key, torch.zeros_like(count), count, top_k=2, most_visible=4
    )
    assert chosen.tolist() == [[0, 2]]


def test_a_query_that_sees_nothing_chooses_nothing(device: torch.device) -> None:
    q, weight, key, first, count = draw((2, 2, 4, 9), device, whole=True)
    chosen = kernel.top_entries(
        q, weight, key, first, torch.zeros_like(count), top_k=3, most_visible=4
    )
    assert (chosen == -1).all()


def test_the_size_of_the_buffer_changes_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw((7, 3, 4, 20), device, whole=False, seed=2)
    whole = choose(problem, 4)
    monkeypatch.setattr(kernel, "SCORE_BYTES", 3 * 4 * int(problem[-1].max()))
    assert torch.equal(choose(problem, 4), whole)


def test_rows_of_scores_longer_than_a_block(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SELECT_BLOCK", 16)
    problem = draw((3, 2, 3, 70), device, whole=True, seed=3)
    assert torch.equal(choose(problem, 20), kernel.reference(*problem, 20))
