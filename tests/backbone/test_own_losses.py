"""The layers' own losses under the loops that people write: a step's is the mean of its
micro-batches', whoever divides, and nobody has to say so.

An indexer learns from its own loss alone, so its gradient shows the share by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_v4 import small_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl_steps import Gradients, gradients_of, step_options

from posttrain.backbone.auxiliary import ScaleOwnLosses, scale_own_losses

LENGTH = 24


@pytest.fixture(scope="module")
def start(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose balance loss is as loud as its main loss."""
    folder = tmp_path_factory.mktemp("start")
    small_model(vocab_size=len(tokenizer), balance_loss_weight=10.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tokenizer: Any) -> list[Tensor]:
    """Five, all of a length."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(3, len(tokenizer), (5, LENGTH), generator=generator))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train()


class Forwards:
    """What a base model's training forwards were given."""

    def __init__(self, model: Any) -> None:
        self.batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        model.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if base.training and torch.is_grad_enabled():
            self.batches.append((args, kwargs))

    def mean_own_gradients(self, model: Any) -> dict[str, Tensor]:
        """Of the own losses alone: what comes back to the hidden states is zero."""
        scale_own_losses(model, 1 / len(self.batches))
        for args, kwargs in self.batches:
            (model.model(*args, **kwargs).last_hidden_state.sum() * 0).backward()
        return gradients_of(model)


def indexers(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: gradient for name, gradient in gradients.items() if ".indexer." in name}
    assert len(found) == 6
    assert all(gradient.any() for gradient in found.values())
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def as_rows(documents: Sequence[Tensor]) -> Dataset:
    ids = [d.tolist() for d in documents]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def options(folder: Path, number: int, **changes: Any) -> dict[str, Any]:
    own = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": number}
    return step_options(folder, **own, **changes)


def plain(
    model: Any, folder: Path, tokenizer: Any, documents: Sequence[Tensor], number: int, **more: Any
) -> Any:
    """transformers' own, `number` micro-batches of one document a step."""
    callbacks: list[TrainerCallback] = more.pop("callbacks")
    return Trainer(
        model,
        args=TrainingArguments(**options(folder, number, **more)),
        train_dataset=as_rows(documents),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=callbacks,
    )


def sft(
    model: Any, folder: Path, tokenizer: Any, documents: Sequence[Tensor], number: int, **more: Any
) -> Any:
    callbacks: list[TrainerCallback] = more.pop("callbacks")
    return SFTTrainer(
        model,
        args=SFTConfig(**options(folder, number, **more)),
        train_dataset=as_rows(documents),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def dpo(model: Any, folder: Path, tokenizer: Any, _: Any, number: int, **more: Any) -> Any:
    rows = {
        "prompt": ["hello there, how", "a", "12 + 4 ="],
        "chosen": [" are you doing today?", " somewhat longer one", " sixteen, I should say"],
        "rejected": [" no, nothing of the kind", " something else", " seventeen and a half"],
    }
    return DPOTrainer(
        model,
        args=DPOConfig(**options(folder, number)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        **more,
    )


PROMPTS = Dataset.from_dict({"prompt": ["hello there, how are you", "a", "12 + 4", "who is it"]})


def grpo(model: Any, folder: Path, tokenizer: Any, _: Any, number: int, **more: Any) -> Any:
    changes: dict[str, Any] = {**options(folder, number), "per_device_train_batch_size": 2}

    def letters(completion_ids: list[list[int]], **row: Any) -> list[float | None]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = GRPOConfig(**changes, num_generations=2, max_completion_length=14, beta=0.1)
    return GRPOTrainer(
        model,
        args=config,
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        reward_funcs=letters,
        **more,
    )


def distillation(model: Any, folder: Path, tokenizer: Any, _: Any, number: int, **more: Any) -> Any:
    config = DistillationConfig(**options(folder, number), max_completion_length=14, beta=1.0)
    teacher = small_model(seed=1, vocab_size=len(tokenizer)).eval()
    return DistillationTrainer(
        model,
        args=config,
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        teacher_model=teacher,
        **more,
    )


Make = Callable[..., Any]


def train(
    make: Make,
    start: Path,
    folder: Path,
    tokenizer: Any,
    documents: Sequence[Tensor],
    number: int,
    **more: Any,
) -> tuple[dict[str, Tensor], Any, Forwards]:
    """The gradients of the last step, the model, and what its forwards were given."""
    gradients, model = Gradients(), load(start)
    forwards = Forwards(model)
    scale_own_losses(model, more.pop("scale", None))
    make(model, folder, tokenizer, documents, number, callbacks=[gradients], **more).train()
    return gradients.found, model, forwards


@pytest.mark.parametrize(
    ("make", "number"),
    [(plain, 1), (plain, 3), (sft, 1), (sft, 3), (dpo, 3), (grpo, 2), (distillation, 3)],
)
def test_every_trainer_gives_indexers_the_mean_of_its_microbatches(
    make: Make,
    number: int,
    start: Path,
    tokenizer: Any,
    documents: list[Tensor],
    tmp_path: Path,
) -> None:
    found, model, forwards = train(make, start, tmp_path, tokenizer, documents[:3], number)
    assert len(forwards.batches) == number
    wanted = forwards.mean_own_gradients(load(start))
    assert_same(indexers(found), indexers(wanted))
    assert model.model.num_microbatches == 1


@pytest.mark.parametrize("make", [plain, sft])
def test_a_step_has_the_mean_gradient_of_its_documents_balance_and_all(
    make: Make, start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    single = [
        train(make, start, tmp_path, tokenizer, [document], 1)[0] for document in documents[:3]
    ]
    wanted = {name: torch.stack([each[name] for each in single]).mean(0) for name in single[0]}
    found, _, _ = train(make, start, tmp_path, tokenizer, documents[:3], 3)
    assert_same(found, wanted)
    gates = [g for n, g in found.items() if n.endswith("gate.weight")]
    assert len(gates) == 3


def test_an_epochs_last_step_counts_the_microbatches_that_it_has(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    more: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.0}
    found, _, forwards = train(plain, start, tmp_path, tokenizer, documents, 3, **more)
    assert len(forwards.batches) == 10
    del forwards.batches[:8]  # 3 + 2 micro-batches an epoch
    assert_same(indexers(found), indexers(forwards.mean_own_gradients(load(start))))


def test_a_scale_that_was_set_is_what_counts(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    found, _, forwards = train(plain, start, tmp_path, tokenizer, documents, 3, scale=0.25)
    mean = forwards.mean_own_gradients(load(start))
    assert_same(indexers(found), indexers({name: 0.75 * g for name, g in mean.items()}))


def backward(model: Any, document: Tensor) -> Tensor:
    return model(input_ids=document[None], labels=document[None]).loss


def test_a_loop_of_ones_own_gives_the_whole_of_each_forwards_loss(
    start: Path, documents: list[Tensor]
) -> None:
    model = load(start)
    forwards = Forwards(model)
    backward(model, documents[0]).backward()
    wanted = forwards.mean_own_gradients(load(start))
    assert_same(indexers(gradients_of(model)), indexers(wanted))


def test_a_loop_on_accelerate_gives_the_mean_that_it_divides_by(
    start: Path, documents: list[Tensor]
) -> None:
    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        model = load(start)
        forwards = Forwards(model)
        for document in documents[:3]:
            with accelerator.accumulate(model):
                accelerator.backward(backward(model, document))
    finally:
        accelerator.gradient_accumulation_steps = 1  # one for the whole process
    wanted = forwards.mean_own_gradients(load(start))
    assert_same(indexers(gradients_of(model)), indexers(wanted))


class Numbers(TrainerCallback):
    """What the model is told in each step."""

    def __init__(self, base: Any) -> None:
        self.base, self.found = base, list[int]()

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(self.base.num_microbatches)


def test_adapters_and_what_merely_holds_a_model_are_told_too(
    start: Path, tokenizer: Any, documents: list[Tensor], tmp_path: Path
) -> None:
    model = load(start)
    told = Numbers(model.model)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_a_proj"]))
    plain(adapted, tmp_path, tokenizer, documents, 3, callbacks=[told]).train()
    assert told.found == [3, 3]
    scale_own_losses(adapted, 0.5)
    assert model.model.auxiliary_scale == 0.5
    callback, state = ScaleOwnLosses(), None
    args = TrainingArguments(**options(tmp_path, 4))
    numbers: list[int] = []
    for holder in (nn.ModuleDict({"policy": model}), nn.Linear(2, 2)):
        callback.on_train_begin(args, state, None, model=holder)
        callback.on_step_begin(args, state, None, model=holder)
        numbers.append(model.model.num_microbatches)
        callback.on_step_end(args, state, None, model=holder)
        numbers.append(model.model.num_microbatches)
    assert numbers == [4, 1, 1, 1]


def test_under_fp16_they_are_scaled_as_the_loss_is(
    start: Path, documents: list[Tensor], tmp_path: Path
) -> None:
    model, callback = load(start).train(), ScaleOwnLosses()
    args = TrainingArguments(**options(tmp_path, 1))

    def backward(**optimizer: Any) -> dict[str, Tensor]:
        model.zero_grad()
        callback.on_train_begin(args, None, None, model=model)
        callback.on_step_begin(args, None, None, model=model, **optimizer)
        (0.0 * model.model(documents[0][None]).last_hidden_state.sum()).backward()
        callback.on_step_end(args, None, None, model=model)
        return indexers(gradients_of(model))

    scaled = backward(optimizer=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 8.0)))
    wanted = {name: 8.0 * gradient for name, gradient in backward().items()}
    assert_same(scaled, wanted)


def test_a_wrapper_that_hands_attributes_on_is_looked_through(start: Path) -> None:
    base = load(start).model
    wrapped: Any = get_peft_model(base, LoraConfig(target_modules=["q_a_proj"]))
    scale_own_losses(wrapped, 0.25)
    assert base.auxiliary_scale == 0.25
    assert "auxiliary_scale" not in vars(wrapped)
