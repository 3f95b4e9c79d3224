"""Muon against a plain reference written from the report's text; learning rates by hand."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.config import OptimizerConfig, learning_rate_factor
from posttrain.optim import UPDATE_RMS, build_optimizer, is_matrix, orthogonalize

GENERATOR = torch.Generator().manual_seed(0)


def reference_newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix.double() / matrix.double().norm()
    for step in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if step < 8 else (2.0, -1.5, 0.5)
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def test_orthogonalize_equals_the_plain_iteration_wide_tall_and_batched() -> None:
    for shape in [(5, 9), (9, 5), (6, 6)]:
        batch = torch.randn(3, *shape, generator=GENERATOR, dtype=torch.float64)
        wanted = torch.stack([reference_newton_schulz(m) for m in batch])
        torch.testing.assert_close(orthogonalize(batch), wanted, rtol=1e-6, atol=1e-6)


def test_orthogonalize_gives_singular_values_near_one() -> None:
    matrix = torch.randn(16, 40, generator=GENERATOR)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    torch.testing.assert_close(values, torch.ones(16), atol=0.02, rtol=0)


def test_two_muon_steps_equal_the_reference() -> None:
    weight = nn.Parameter(torch.randn(6, 4, generator=GENERATOR))
    holder = nn.Module()
    holder.weight = weight
    optimizer = build_optimizer(holder, name="muon", learning_rate=0.1, weight_decay=0.1)
    wanted, momentum = weight.detach().clone(), torch.zeros(6, 4)
    for _ in range(2):
        grad = torch.randn(6, 4, generator=GENERATOR)
        weight.grad = grad.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        update = 0.05 * grad + 0.95 * momentum  # Nesterov
        step = reference_newton_schulz(update).float() * UPDATE_RMS * math.sqrt(6)
        wanted = wanted * (1 - 0.1 * 0.1) - 0.1 * step
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_each_expert_is_orthogonalized_on_its_own() -> None:
    experts = nn.Parameter(torch.zeros(3, 8, 5))
    holder = nn.Module()
    holder.experts = experts
    experts.grad = (
        torch.randn(3, 8, 5, generator=GENERATOR) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    )
    build_optimizer(holder, name="muon", learning_rate=1.0, weight_decay=0.0).step()
    for expert in experts.detach():
        values = torch.linalg.svdvals(expert) / (UPDATE_RMS * math.sqrt(8))
        torch.testing.assert_close(values, torch.ones(5), atol=0.03, rtol=0)


def test_vectors_and_tables_follow_torchs_adamw() -> None:
    torch_vector = nn.Parameter(torch.randn(7, generator=GENERATOR))
    holder = nn.Module()
    holder.norm = nn.Parameter(torch_vector.detach().clone())
    ours = build_optimizer(holder, name="muon", learning_rate=0.01, weight_decay=0.1)
    theirs = torch.optim.AdamW([torch_vector], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        holder.norm.grad = torch.randn(7, generator=GENERATOR)
        torch_vector.grad = holder.norm.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(holder.norm.detach(), torch_vector.detach())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_parameter_without_a_gradient_stays_as_it_is(name: Literal["muon", "adamw"]) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = build_optimizer(module, name=name, learning_rate=0.1, weight_decay=0.5)
    module[0](torch.randn(3, 4, generator=GENERATOR)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]


def test_resumed_equals_straight_to_the_bit() -> None:
    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in module.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    straight = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    resumed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    resumed.load_state_dict(straight.state_dict())
    first = build_optimizer(straight, name="muon", learning_rate=0.02)
    second = build_optimizer(resumed, name="muon", learning_rate=0.02)
    steps(straight, first, range(4))
    steps(resumed, second, range(2))
    third = build_optimizer(resumed, name="muon", learning_rate=0.02)
    third.load_state_dict(second.state_dict())
    steps(resumed, third, range(2, 4))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_v4_parameters_go_to_the_optimizer_the_report_names() -> None:
    config = preset_config("tiny", vocab_size=40, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = V4ForCausalLM(config)
    muon = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    assert "model.layers.1.mlp.experts.gate_up_proj" in muon
    assert "model.layers.0.attn_hc.fn" in muon
    for name in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.attn_hc.base",
        "model.layers.1.self_attn.compressor.position_bias",
        "model.layers.0.self_attn.sinks",
    ]:
        assert name not in muon


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weights_and_tables_decay_and_biases_do_not(name: Literal["muon", "adamw"]) -> None:
    config = preset_config("tiny", vocab_size=40, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = V4ForCausalLM(config)
    optimizer = build_optimizer(model, name=name, learning_rate=0.1, weight_decay=0.3)
    name_of = {id(p): name for name, p in model.named_parameters()}
    decay = {
        name_of[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decay.keys() == set(name_of.values())
    assert decay["lm_head.weight"] == decay["model.embed_tokens.weight"] == 0.3
    assert decay["model.layers.1.mlp.experts.gate_up_proj"] == 0.3
    biases = [n for n in decay if "position_bias" in n or "norm" in n or n.endswith("sinks")]
    assert len(biases) > 3
    assert all(decay[name] == 0.0 for name in biases)


def factors(num_steps: int, **fields: object) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 1e-3, **fields})
    return [learning_rate_factor(s, num_steps=num_steps, config=config) for s in range(num_steps)]


def test_learning_rates_by_hand() -> None:
    assert factors(6) == [1.0] * 6
    # two steps of warm-up at 1/3 and 2/3, then 4 steps down to zero at step 6
    wanted = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    assert factors(6, warmup_steps=2, schedule="linear") == pytest.approx(wanted)
    cosine = [1 / 3, 2 / 3, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]
    assert factors(6, warmup_steps=2, schedule="cosine") == pytest.approx(cosine)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 3), (5, 5), (5, 9), (400, 20)])
def test_every_step_learns_and_the_last_of_many_hardly(
    schedule: str, num_steps: int, warmup_steps: int
) -> None:
    found = factors(num_steps, warmup_steps=warmup_steps, schedule=schedule)
    assert all(0 < factor <= 1 for factor in found)
    assert num_steps < 400 or schedule == "constant" or found[-1] < 0.01
