"""Offline trainers as they come, one real step: transformers' Trainer and TRL's SFT, DPO and KTO.

Documents reach the model padded, padding-free or packed; the gradients are those of each document
run alone with the plain loss written out here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_v4 import small_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl_steps import Gradients, gradients_of, step_options

from posttrain.backbone import V4ForCausalLM
from posttrain.backbone.balance import BalanceExperts

LENGTHS = (13, 1, 29, 4, 40, 22)
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def start(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose window (7), top-k (4) and rates (4, 8) are shorter than most documents."""
    folder = tmp_path_factory.mktemp("start")
    small_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, len(tokenizer), (n,), generator=generator) for n in LENGTHS]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"per_device_train_batch_size": len(LENGTHS)}
    return step_options(folder, **{**own, **changes})


def load(folder: Path) -> V4ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is V4ForCausalLM
    return model.train()


def as_rows(documents: Sequence[Tensor]) -> Dataset:
    ids = [d.tolist() for d in documents]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def mean_next_token_loss(model: Any, documents: Sequence[Tensor]) -> list[Tensor]:
    """-1/n sum log p(token | what stands before it in its own document), n tokens in all: what
    each document adds, one forward each."""
    num_tokens = sum(len(d) - 1 for d in documents)
    return [
        -model(d[None]).logits[0, :-1].log_softmax(-1).gather(1, d[1:, None]).sum() / num_tokens
        for d in documents
    ]


def plain_loss(start: Path, documents: Sequence[Tensor]) -> float:
    with torch.no_grad():
        return float(torch.stack(mean_next_token_loss(load(start), documents)).sum())


@pytest.fixture(scope="module")
def alone(start: Path, documents: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the plain loss, each document unpadded in a forward of its own; the layers'
    own losses are means over tokens."""
    model = load(start)
    num_tokens, num_targets = sum(map(len, documents)), sum(len(d) - 1 for d in documents)
    for document in documents:
        model.model.auxiliary_scale = len(document) / num_tokens
        if len(document) > 1:
            (loss,) = mean_next_token_loss(model, [document])
            (loss * (len(document) - 1) / num_targets).backward()
    return gradients_of(model)


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Relative 1e-4, the indexer's too."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def train_sft(
    start: Path,
    tokenizer: Any,
    documents: Sequence[Tensor],
    *,
    auxiliary_scale: float = 1.0,
    **changes: Any,
) -> tuple[SFTTrainer, dict[str, Tensor]]:
    gradients, model = Gradients(), load(start)
    model.model.auxiliary_scale = auxiliary_scale
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**changes),
        train_dataset=as_rows(documents),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    return trainer, gradients.found


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64},
    "packed, with pads at the end": {"packing": True, "max_length": 64, "pad_to_multiple_of": 8},
    "packed, without checkpointing": {
        "packing": True,
        "max_length": 64,
        "gradient_checkpointing": False,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_gives_the_gradients_of_the_documents_alone(
    layout: str,
    start: Path,
    tokenizer: Any,
    documents: list[Tensor],
    alone: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    changes = options(tmp_path, **LAYOUTS[layout])
    if "pad_to_multiple_of" in changes:  # 109 tokens and 3 pads, documents of one token each
        changes["auxiliary_scale"] = 112 / 109
    trainer, found = train_sft(start, tokenizer, documents, **changes)
    assert_same_gradients(found, alone)
    wanted = plain_loss(start, documents)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_in_sft_the_balance_callback_moves_biases_by_the_load_of_the_documents(
    layout: str, start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    """Pads and the layers' second pass in the backward count for nothing."""
    model: Any = load(start)
    routes = [model(d[None], capture_routes=True).routes for d in documents]
    chosen_LX = torch.cat([route.expert_LTk for route in routes], dim=1).flatten(1)
    trained: Any = load(start)
    arguments = options(tmp_path, **LAYOUTS[layout])
    SFTTrainer(
        trained,
        args=SFTConfig(**arguments),
        train_dataset=as_rows(documents),
        processing_class=tokenizer,
        callbacks=[BalanceExperts(speed=0.25)],
    ).train()
    gates = [layer.mlp.gate for layer in trained.model.layers]
    biases = [(i, g.e_score_correction_bias) for i, g in enumerate(gates) if hasattr(g, BIAS)]
    assert 0 < len(biases) < len(gates)
    for layer, bias in biases:
        load_E = chosen_LX[layer].bincount(minlength=len(bias)).float()
        assert torch.equal(bias, 0.25 * (load_E.mean() - load_E).sign())


def test_two_microbatches_of_one_document_give_its_gradients_the_indexers_too(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    # what divides the trainer's loss by the two is its own affair; the layers' losses are told
    document, cuts = documents[4], options(tmp_path, per_device_train_batch_size=1)
    _, once = train_sft(start, tokenizer, [document], **cuts)
    cuts["gradient_accumulation_steps"] = 2
    _, twice = train_sft(start, tokenizer, [document] * 2, auxiliary_scale=0.5, **cuts)
    assert_same_gradients(twice, once)


def test_sft_trains_every_indexer_tensor(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    changes = options(tmp_path, packing=True, max_length=64)
    _, found = train_sft(start, tokenizer, documents, **changes)
    names = [n for n, _ in load(start).named_parameters() if ".indexer." in n]
    assert len(names) == 6
    assert [n for n in names if n not in found or not found[n].any()] == []


def test_sft_in_trls_default_precision_stays_near_float32(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    # bf16 autocast over fp32 masters: rounding is 2^-9 a product, so losses agree to a percent
    changes = options(tmp_path, packing=True, max_length=64, bf16=True)
    trainer, found = train_sft(start, tokenizer, documents, **changes)
    wanted = plain_loss(start, documents)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-2)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
    assert trainer.model is not None
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_trainers_step_checkpoints_are_read_by_stock_and_resumed(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    # transformers 5.23 resumes with the base class of all configs, which refuses "hash_moe" in
    # mlp_layer_types (stock's own checkpoints cannot be resumed): config.json must do without
    changes = options(
        tmp_path, save_strategy="steps", save_steps=1, max_steps=2, per_device_train_batch_size=3
    )
    straight, _ = train_sft(start, tokenizer, documents, **changes)
    stock_class: Any = DeepseekV4ForCausalLM
    stock, info = stock_class.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not any(info.values()), info
    assert straight.model is not None
    trained = straight.model.state_dict()
    assert all(torch.equal(t, trained[name]) for name, t in stock.state_dict().items())
    first = str(tmp_path / "checkpoint-1")
    resumed, _ = train_sft(start, tokenizer, documents, **changes, resume_from_checkpoint=first)
    assert resumed.model is not None
    assert all(torch.equal(t, trained[n]) for n, t in resumed.model.state_dict().items())


def test_transformers_own_trainer_accumulates_to_the_same_gradients(
    start: Path,
    tokenizer: Any,
    documents: list[Tensor],
    alone: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    gradients = Gradients()
    changes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    Trainer(
        load(start),
        args=TrainingArguments(**options(tmp_path, **changes)),
        train_dataset=as_rows(documents),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[gradients],
    ).train()
    without_indexer = {n: g for n, g in alone.items() if ".indexer." not in n}
    assert_same_gradients({n: gradients.found[n] for n in without_indexer}, without_indexer)


def preferences() -> dict[str, list[str]]:
    return {
        "prompt": ["hello there, how", "a"],
        "chosen": [" are you doing today, my friend?", " b"],
        "rejected": [" no", " something else altogether"],
    }


def judged() -> dict[str, list[Any]]:
    return {
        "prompt": ["hello there, how", "a", "x", "12 + 4 ="],
        "completion": [" are you doing today, my friend?", " b", " no", " 16 of them"],
        "label": [True, False, True, False],
    }


PREFERENCE: dict[str, tuple[Any, Any, Callable[[], dict[str, Any]], float]] = {
    # where policy and reference agree: DPO -log sigmoid(0), KTO 1 - sigmoid(0)
    "DPO": (DPOTrainer, DPOConfig, preferences, 0.693147),
    "KTO": (KTOTrainer, KTOConfig, judged, 0.5),
}


@pytest.mark.parametrize("kind", PREFERENCE)
@pytest.mark.parametrize("bf16", [False, True])
def test_preference_trainers_start_from_a_reference_that_is_ours_and_equal(
    kind: str, bf16: bool, start: Path, tokenizer: Any, tmp_path: Path
) -> None:
    trainer_class, config_class, rows, loss = PREFERENCE[kind]
    gradients = Gradients()
    trainer = trainer_class(
        load(start),
        args=config_class(**options(tmp_path, bf16=bf16, per_device_train_batch_size=4)),
        train_dataset=Dataset.from_dict(rows()),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    assert type(trainer.ref_model) is V4ForCausalLM
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    assert all(torch.equal(t, before[n]) for n, t in trainer.ref_model.state_dict().items())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    assert all(g.isfinite().all() for g in gradients.found.values())
    queries = [g for n, g in gradients.found.items() if n.endswith("self_attn.q_b_proj.weight")]
    assert len(queries) == 3
    assert all(g.any() for g in queries)
    assert all(torch.equal(t, before[n]) for n, t in trainer.ref_model.state_dict().items())
