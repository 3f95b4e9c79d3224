"""Experts as one function: plain autograd in float64, gradcheck, both ways of multiplying."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import again
from posttrain.backbone.experts import (
    ROWS,
    Groups,
    RoutedExperts,
    Serving,
    V4SharedExpert,
    routed,
    run_experts,
    served,
)
from posttrain.backbone.fp4 import fake_fp8_activation
from posttrain.backbone.swiglu import SwiGLU, swiglu_backward

LIMIT = 0.7
SHAPES = [(1, 5, 3, 4, 1), (9, 6, 5, 3, 2), (33, 4, 7, 6, 3), (4, 3, 2, 9, 2)]
"""Tokens, hidden size, expert width, experts, experts a token."""


def draw(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    tokens, hidden, width, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    chosen = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)]
    return SimpleNamespace(
        x=normal(tokens, hidden),
        weight=normal(tokens, top_k),
        gate_up_proj=normal(num_experts, 2 * width, hidden),
        down_proj=normal(num_experts, hidden, width),
        expert=torch.stack(chosen),
        limit=LIMIT,
    )


def parameters(p: Any) -> list[Tensor]:
    return [p.x, p.weight, p.gate_up_proj, p.down_proj]


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def plain(p: Any, rounded: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """`rounded`: the inputs of both matrices."""
    rows: list[Tensor] = []
    for x, weights, names in zip(p.x, p.weight, p.expert, strict=True):
        outs = [
            p.down_proj[e] @ rounded(w * plain_swiglu(p.gate_up_proj[e] @ rounded(x)))
            for w, e in zip(weights, names, strict=True)
        ]
        rows.append(torch.stack(outs).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize("is_long", [False, True])
def test_experts_equal_plain_autograd(
    shape: tuple[int, ...], *, rounds_inputs: bool, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long batch goes an expert at a time."""
    monkeypatch.setattr(again, "KEPT", 0 if is_long else 4096)
    p = draw(shape)
    found = run_experts(p, p.x, p.expert, p.weight, rounds_inputs=rounds_inputs)
    wanted = plain(p, fake_fp8_activation) if rounds_inputs else plain(p)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    seen = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    gradients = [torch.autograd.grad((out * seen).sum(), parameters(p)) for out in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_gradcheck_in_float64() -> None:
    p = draw((4, 3, 2, 3, 2))
    check: Any = torch.autograd.gradcheck
    assert check(lambda *x: RoutedExperts.apply(*x, p.expert, Serving(LIMIT)), tuple(parameters(p)))


def test_swiglu_passes_nothing_where_a_clamp_cut() -> None:
    gate_up = torch.tensor([[0.9, 0.2, 0.1, -0.9]], dtype=torch.float64, requires_grad=True)
    seen = torch.ones(1, 2, dtype=torch.float64)
    wanted_out = plain_swiglu(gate_up)
    (wanted,) = torch.autograd.grad(wanted_out, gate_up, seen)
    found_out: Any = SwiGLU.apply(*gate_up.chunk(2, dim=-1), LIMIT)
    (found,) = torch.autograd.grad(found_out, gate_up, seen)
    torch.testing.assert_close(found_out, wanted_out)
    torch.testing.assert_close(found, wanted)
    assert found[0, 0] == found[0, 3] == 0


def test_the_shared_expert_equals_stocks() -> None:
    config = DeepseekV4Config(hidden_size=8, moe_intermediate_size=6, swiglu_limit=LIMIT)
    expert, generator = stock.DeepseekV4MLP(config), torch.Generator().manual_seed(0)
    for parameter in expert.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x = torch.randn(7, 8, generator=generator, requires_grad=True)
    outs = [(module, module(x)) for module in (V4SharedExpert(expert), expert)]
    torch.testing.assert_close(outs[0][1], outs[1][1], atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out.sum(), [x, *m.parameters()]) for m, out in outs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_an_expert_without_a_token_has_a_gradient_of_zeros() -> None:
    p = draw((3, 4, 2, 5, 2))
    p.expert = torch.tensor([[0, 3], [3, 0], [0, 3]])
    run_experts(p, p.x, p.expert, p.weight).sum().backward()
    for gradient in (p.gate_up_proj.grad, p.down_proj.grad):
        assert torch.equal(gradient[[1, 2, 4]], torch.zeros_like(gradient[[1, 2, 4]]))
        assert gradient[[0, 3]].abs().sum() > 0


def test_no_tokens_give_zero_gradients() -> None:
    p = draw((3, 4, 2, 5, 2))
    out = run_experts(p, p.x[:0], p.expert[:0], p.weight[:0])
    out.sum().backward()
    assert out.shape == (0, 4)
    assert torch.equal(p.down_proj.grad, torch.zeros_like(p.down_proj))


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [2, 2, 2, 2]])
def test_a_grouped_product_equals_one_product_an_expert(counts: list[int]) -> None:
    # torch's grouped_mm wants rows of a multiple of 16 bytes
    generator = torch.Generator().manual_seed(0)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    rows, other = torch.randn(2, len(expert), 8, generator=generator)
    matrix = torch.randn(4, 12, 8, generator=generator)
    grouped, single = (Groups(expert, 4, is_grouped=flag) for flag in (True, False))
    for first, second in [
        (grouped.times(rows, matrix.mT), single.times(rows, matrix.mT)),
        (grouped.outer(rows, other), single.outer(rows, other)),
    ]:
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_gradients() -> None:
    p = draw((9, 8, 4, 3, 2), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_experts(p, p.x, p.expert, p.weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(p), atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in parameters(p))


def test_frozen_experts_still_pass_their_inputs_gradient() -> None:
    p = draw((5, 4, 3, 4, 2))
    trained = torch.autograd.grad(run_experts(p, p.x, p.expert, p.weight).sum(), p.x)[0]
    p.gate_up_proj.requires_grad_(False)
    p.down_proj.requires_grad_(False)
    frozen = torch.autograd.grad(run_experts(p, p.x, p.expert, p.weight).sum(), p.x)[0]
    assert torch.equal(trained, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_pass_at_the_limit_and_stop_beyond(dtype: torch.dtype) -> None:
    values = torch.tensor([-10.5, -10.0, -9.5, 9.5, 10.0, 10.5], dtype=dtype)
    gate, up = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    grad = torch.linspace(1, 2, len(up)).to(dtype)
    found = torch.empty_like(gate), torch.empty_like(up)
    swiglu_backward(grad, gate, up, 10.0, out=found)
    inputs = gate.float().requires_grad_(), up.float().requires_grad_()
    out = torch.nn.functional.silu(inputs[0].clamp(max=10.0)) * inputs[1].clamp(-10.0, 10.0)
    for a, b in zip(found, torch.autograd.grad(out, inputs, grad.float()), strict=True):
        torch.testing.assert_close(
            a.float(), b, rtol=0.01 if dtype == torch.bfloat16 else 1e-6, atol=0
        )


@pytest.mark.parametrize("shape", [*SHAPES, (40, 8, 6, 12, 2), (ROWS, 8, 6, 5, 2)])
@torch.no_grad()
def test_without_gradients_experts_give_the_same(shape: tuple[int, ...]) -> None:
    p = draw(shape)
    for serving in (Serving(LIMIT), Serving(LIMIT, rounds_inputs=True)):
        args = p.x, p.weight, p.gate_up_proj, p.down_proj, p.expert, serving
        torch.testing.assert_close(served(*args), routed(*args)[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_token_has_the_same_bits_wherever_others_go(dtype: torch.dtype) -> None:
    p = draw((64, 96, 48, 8, 2), dtype=dtype)
    args = p.x, p.weight, p.gate_up_proj, p.down_proj
    wanted = served(*args, p.expert, Serving(LIMIT))[:1]
    generator = torch.Generator().manual_seed(1)
    for num_elsewhere in (0, 1, 2, 3, 7, ROWS, 40, 63):  # the first token's experts: 64 .. 1 rows
        expert = p.expert[:1].expand(64, -1).clone()
        others = [e for e in range(8) if e not in p.expert[0]]
        for row in 63 - torch.randperm(63, generator=generator)[:num_elsewhere]:
            expert[row] = torch.tensor(others)[torch.randperm(6, generator=generator)[:2]]
        assert torch.equal(served(*args, expert, Serving(LIMIT))[:1], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("serving", [Serving(LIMIT), Serving(LIMIT, True, True)])
@pytest.mark.parametrize("num_tokens", [1, 5, ROWS])
@torch.no_grad()
def test_few_tokens_have_the_same_bits_alone_and_among_others(
    num_tokens: int, serving: Serving, dtype: torch.dtype
) -> None:
    p = draw((64, 96, 64, 8, 2), dtype=dtype)
    x = fake_fp8_activation(p.x) if serving.rounds_inputs else p.x
    wanted = served(x, p.weight, p.gate_up_proj, p.down_proj, p.expert, serving)
    for rows in torch.randperm(64, generator=torch.Generator().manual_seed(1)).split(num_tokens):
        args = x[rows], p.weight[rows], p.gate_up_proj, p.down_proj, p.expert[rows], serving
        assert torch.equal(served(*args), wanted[rows])


@pytest.mark.parametrize("num_tokens", [20, ROWS])
@torch.no_grad()
def test_a_token_that_is_no_number_spoils_no_other(num_tokens: int) -> None:
    p = draw((num_tokens, 6, 5, 3, 2))
    args = p.weight, p.gate_up_proj, p.down_proj, p.expert, Serving(LIMIT)
    wanted = served(p.x, *args)
    x = p.x.clone()
    x[3] = float("nan")
    is_well = torch.arange(num_tokens) != 3
    assert torch.equal(served(x, *args)[is_well], wanted[is_well])
