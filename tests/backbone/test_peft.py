"""PEFT's LoRA on V4 (train, save, load, merge) and accelerate (prepare, clip, restore)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from small_v4 import VOCAB, small_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.backbone import V4ForCausalLM

ATTENTION = r".*self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    "all-linear": {"target_modules": "all-linear"},
}
IDS = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    small_model().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(start: Path, kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(load(start), LoraConfig(r=2, lora_alpha=8, **TARGETS[kind]))


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: Any, num_steps: int = 2) -> dict[str, Tensor]:
    """The last step's gradients; LoRA's B starts at zero, so A has none at the first."""
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return {n: p.grad for n, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_trains_saves_loads_and_merges(kind: str, start: Path, tmp_path: Path) -> None:
    model, untouched = adapted(start, kind), load(start).state_dict()
    before = logits(load(start))
    torch.testing.assert_close(logits(model), before, atol=2e-6, rtol=0)  # W + 0, another layout
    found = train(model)
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert [n for n in names if n not in found or not found[n].any()] == []
    after = logits(model)
    assert (after - before).abs().max() > 0.05
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(load(start), tmp_path)
    assert torch.equal(logits(loaded), after)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), before)
    merged = loaded.merge_and_unload()
    assert type(merged) is V4ForCausalLM
    assert merged.state_dict().keys() == untouched.keys()
    torch.testing.assert_close(logits(merged), after, atol=2e-5, rtol=0)


def test_lora_on_experts_reaches_each_expert_alone(start: Path) -> None:
    # Delta W[e] = scale * B[:, e] A[e]: what an expert learns moves no other
    model = adapted(start, "experts")
    train(model)
    merged = model.merge_and_unload().state_dict()
    plain = load(start).state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    moved = (merged[name] - plain[name]).abs().amax(dim=(1, 2))
    assert (moved > 0).all()
    pairs = zip(merged[name], plain[name], strict=True)
    ranks = [int(torch.linalg.matrix_rank(m - p, tol=1e-4)) for m, p in pairs]
    assert max(ranks) <= 2


@pytest.mark.parametrize("kind", ["both"])
def test_checkpointing_changes_no_adapters_gradient(kind: str, start: Path) -> None:
    wanted = train(adapted(start, kind))
    model = adapted(start, kind)
    model.gradient_checkpointing_enable()
    found = train(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_accelerate_prepares_clips_and_restores(start: Path, tmp_path: Path) -> None:
    accelerator: Any = Accelerator(cpu=True)
    model = load(start).train()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(model).items()}
    accelerator.save_state(str(tmp_path / "state"))

    def step() -> dict[str, Tensor]:
        accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        assert norm is not None
        assert norm > 0.1
        clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        assert float(clipped.norm()) == pytest.approx(0.1, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        return {n: t.clone() for n, t in accelerator.unwrap_model(model).state_dict().items()}

    once = step()
    assert any(not torch.equal(once[name], before[name]) for name in before)
    accelerator.load_state(str(tmp_path / "state"))
    again = step()
    assert all(torch.equal(again[name], once[name]) for name in once)
    saved = tmp_path / "model"
    accelerator.unwrap_model(model).save_pretrained(
        saved, state_dict=accelerator.get_state_dict(model)
    )
    assert all(torch.equal(t, once[name]) for name, t in load(saved).state_dict().items())
