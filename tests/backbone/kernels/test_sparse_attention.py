"""Sparse attention equals one dense softmax in float64, forward and backward, and always gives the
same bits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone.kernels import sparse_attention as kernel

SHAPES = [  # T, h, d, P, K: odd ones, more than one block of heads, of keys and of dims
    (3, 2, 8, 5, 4),
    (2, 17, 20, 40, 35),
    (5, 1, 33, 7, 17),
    (1, 40, 136, 64, 16),
]


@dataclass
class Problem:
    q: Tensor
    pool: Tensor
    index: Tensor
    sink: Tensor
    grad_out: Tensor
    grad_logsumexp: Tensor
    scale: float


def draw(
    shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Problem:
    """Each query lists distinct rows, about a third of its slots hold none."""
    tokens, heads, size, rows, keys = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    index = torch.rand(tokens, max(rows, keys), generator=generator).argsort(-1)[:, :keys]
    none = torch.rand(tokens, keys, generator=generator) < 0.3
    index = index.masked_fill(none | (index >= rows), -1).int()
    q, pool = normal(tokens, heads, size).to(dtype), normal(rows, size).to(dtype)
    grads = normal(tokens, heads, size).to(dtype), normal(tokens, heads)
    parts = [x.to(device) for x in (q, pool, index, normal(heads), *grads)]
    return Problem(*parts, scale=size**-0.5)


def run(p: Problem) -> dict[str, Tensor]:
    """The kernel's results and gradients by name."""
    q, pool, sink = (x.clone().requires_grad_() for x in (p.q, p.pool, p.sink))
    out, logsumexp = kernel.sparse_attention(q, pool, p.index, sink, scale=p.scale)
    torch.autograd.backward([out, logsumexp], [p.grad_out, p.grad_logsumexp])
    received = kernel.attention_received(q, pool, p.index, logsumexp, scale=p.scale)
    return results(out, logsumexp, received, q, pool, sink)


def wanted(p: Problem) -> dict[str, Tensor]:
    """The same by dense torch in float64."""
    q, pool, sink = (x.double().requires_grad_() for x in (p.q, p.pool, p.sink))
    out, logsumexp, received = kernel.reference(q, pool, p.index, sink, scale=p.scale)
    torch.autograd.backward([out, logsumexp], [p.grad_out.double(), p.grad_logsumexp.double()])
    return results(out, logsumexp, received, q, pool, sink)


def results(
    out: Tensor, logsumexp: Tensor, received: Tensor, q: Tensor, pool: Tensor, sink: Tensor
) -> dict[str, Tensor]:
    assert q.grad is not None
    assert pool.grad is not None
    assert sink.grad is not None
    values = {"out": out.detach(), "logsumexp": logsumexp.detach(), "received": received.detach()}
    return values | {"grad_q": q.grad, "grad_pool": pool.grad, "grad_sink": sink.grad}


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_the_dense_softmax(
    shape: tuple[int, int, int, int, int], device: torch.device
) -> None:
    problem = draw(shape, device, torch.float32)
    found, right = run(problem), wanted(problem)
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), right[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_bfloat16_is_within_its_rounding(
    shape: tuple[int, int, int, int, int], device: torch.device
) -> None:
    problem = draw(shape, device, torch.bfloat16)
    found, right = run(problem), wanted(problem)
    for name, value in found.items():
        error = (value.double() - right[name]).norm() / right[name].norm()
        assert error < 1e-2, f"{name}: {error}"
    assert found["out"].dtype == found["grad_q"].dtype == found["grad_pool"].dtype == torch.bfloat16


def test_a_query_without_keys_gives_zero_and_only_its_sink_counts(device: torch.device) -> None:
    problem = draw((2, 3, 8, 4, 5), device, torch.float32)
    problem.index[0] = -1
    found = run(problem)
    assert not found["out"][0].any()
    assert not found["grad_q"][0].any()
    assert not found["received"][0].any()
    torch.testing.assert_close(found["logsumexp"][0], problem.sink, atol=1e-6, rtol=0)


def test_a_row_nobody_lists_gets_no_gradient(device: torch.device) -> None:
    problem = draw((3, 2, 8, 6, 4), device, torch.float32)
    problem.index[problem.index == 2] = -1
    assert not run(problem)["grad_pool"][2].any()


def test_a_row_listed_twice_counts_twice(device: torch.device) -> None:
    problem = draw((2, 2, 8, 4, 3), device, torch.float32)
    problem.index = torch.tensor([[1, 1, 3], [0, -1, 0]], dtype=torch.int32, device=device)
    found, right = run(problem), wanted(problem)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), right[name], atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    problem = draw((2, 2, 8, 6, 4), device, torch.float32)
    problem.q *= 300
    found, right = run(problem), wanted(problem)
    torch.testing.assert_close(found["out"].double(), right["out"], atol=1e-3, rtol=1e-3)
    assert all(value.isfinite().all() for value in found.values())


def test_the_size_of_the_buffer_changes_no_bit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw((7, 2, 8, 3, 4), device, torch.float32)
    whole = run(problem)
    for tokens in (1, 3):
        monkeypatch.setattr(kernel, "PAIR_BYTES", tokens * 4 * 4 * 8)
        again = run(problem)
        assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_only_the_gradients_asked_for_are_made(device: torch.device) -> None:
    problem = draw((2, 2, 8, 4, 3), device, torch.float32)
    sink = problem.sink.requires_grad_()
    out, _ = kernel.sparse_attention(
        problem.q, problem.pool, problem.index, sink, scale=problem.scale
    )
    out.backward(problem.grad_out)
    assert sink.grad is not None
    assert problem.q.grad is None
    assert problem.pool.grad is None
