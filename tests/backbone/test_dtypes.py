"""Which tensors are float32 in a narrow model, and that tables and biases survive every save, load,
dtype change and weight sync."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_config
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM

STRICT = (
    "attn_hc",
    "ffn_hc",
    "hc_head",
    "sinks",
    "position_bias",
    "e_score_correction_bias",
    "q_a_norm",
    "kv_norm",
    "input_layernorm",
    "post_attention_layernorm",
    "norm",
)
"""mHC, sinks, norms and biases: float32 in official checkpoints or in the official maths."""
IDS = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))


def make_model(seed: int = 0) -> Any:  # torch types .to and buffers too narrowly
    config = small_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and ".e_score" not in name:
                tensor += 0.1 * torch.randn_like(tensor)
            elif tensor.is_floating_point():  # large beside a step of 0.001, as after long training
                tensor += 3 + 0.001 * torch.randn_like(tensor)
    return model


def is_strict(name: str) -> bool:
    return not set(name.split(".")).isdisjoint(STRICT)


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from ((n, b) for n, b in model.named_buffers() if b.is_floating_point())


def assert_dtypes(model: Any, dtype: torch.dtype) -> None:
    found = {n: t.dtype for n, t in tensors(model) if "inv_freq" not in n}
    assert sum(map(is_strict, found)) > 40
    wanted = {n: torch.float32 if is_strict(n) else dtype for n in found}
    assert {n: d for n, d in found.items() if d != wanted[n]} == {}


def assert_runs(model: Any, wanted: float, rel: float) -> None:
    model.train()
    loss = model(IDS, labels=IDS).loss
    assert float(loss.detach()) == pytest.approx(wanted, rel=rel)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []


def loss_in_float32(model: Any) -> float:
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
    return float(loss)


NARROW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", NARROW)
def test_from_pretrained_keeps_what_must_be_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    narrow: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_dtypes(narrow, dtype)
    wide = model.state_dict()
    assert all(torch.equal(t, wide[n].to(t.dtype)) for n, t in narrow.state_dict().items())
    assert_runs(narrow, loss_in_float32(model), rel=1e-2)


@pytest.mark.parametrize("dtype", NARROW)
def test_from_config_keeps_what_must_be_float32(dtype: torch.dtype) -> None:
    model: Any = AutoModelForCausalLM.from_config(make_model().config, dtype=dtype)
    assert_dtypes(model, dtype)
    table = model.model.layers[0].mlp.gate.tid2eid
    assert table.dtype == torch.int64
    assert int(torch.bincount(table.flatten(), minlength=8).min()) > 0


@pytest.mark.parametrize("dtype", NARROW)
def test_a_change_of_dtype_narrows_nothing_that_must_be_float32(dtype: torch.dtype) -> None:
    model, wide = make_model(), make_model().state_dict()
    loss = loss_in_float32(model)
    model = model.to(dtype)
    assert_dtypes(model, dtype)
    strict = {n: t for n, t in model.state_dict().items() if is_strict(n) or "tid2eid" in n}
    assert all(torch.equal(t, wide[n]) for n, t in strict.items())
    assert_runs(model, loss, rel=1e-2)
    model = model.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_float64_is_float64_throughout() -> None:
    model = make_model()
    loss = loss_in_float32(model)
    model = model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_runs(model, loss, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_models_are_saved_for_stock_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "start")
    ours_class: Any = V4ForCausalLM
    stock_class: Any = DeepseekV4ForCausalLM
    ours = ours_class.from_pretrained(tmp_path / "start", dtype=dtype)
    ours.save_pretrained(tmp_path / "ours")
    stock, info = stock_class.from_pretrained(
        tmp_path / "ours", dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    stock.save_pretrained(tmp_path / "stock", save_original_format=False)
    back, info = ours_class.from_pretrained(
        tmp_path / "stock", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    for name, tensor in ours.state_dict().items():
        for other in (stock, back):
            found = other.state_dict()[name]
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_sync_carries_tables_and_biases(dtype: torch.dtype) -> None:
    # a zero table was once pushed to a sampler: buffers are part of what is synchronised
    learner, sampler = make_model(0), make_model(1).to(dtype)
    names = [n for n in learner.state_dict() if "tid2eid" in n or "e_score_correction_bias" in n]
    assert len(names) == 3
    sampler.load_state_dict(learner.state_dict(), strict=True)
    for name in names:
        assert torch.equal(sampler.state_dict()[name], learner.state_dict()[name]), name
    assert_dtypes(sampler, dtype)


def test_shards_carry_everything(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())


def test_new_tokens_get_embeddings_and_experts() -> None:
    model = make_model()
    table = model.model.layers[0].mlp.gate.tid2eid.clone()
    model.resize_token_embeddings(80, mean_resizing=False)
    grown = model.model.layers[0].mlp.gate.tid2eid
    assert torch.equal(grown[:VOCAB], table)
    assert len(grown) == model.config.vocab_size == 80
    assert all(len(set(row)) == grown.shape[1] for row in grown.tolist())
    ids = torch.tensor([[79, 5, 70, 61]])
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert len(model.lm_head.weight.grad) == 80


@pytest.mark.parametrize("names", ["transformers' own", "official"])
def test_what_stock_saves_by_default_or_in_its_own_names_is_read_whole(
    names: str, tmp_path: Path
) -> None:
    # the default is official names; unread ones would be drawn anew with no more than a report
    ours_class: Any = V4ForCausalLM
    stock: Any = DeepseekV4ForCausalLM(make_model().config)
    stock.load_state_dict(make_model().state_dict())
    stock.save_pretrained(tmp_path, save_original_format=names == "official")
    ours, info = ours_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    found = ours.state_dict()
    assert all(torch.equal(found[n], t) for n, t in stock.state_dict().items())
