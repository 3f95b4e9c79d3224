"""TRL's online trainers as they come, one real step: GRPO, RLOO and Distillation.

They sample with the model's own `generate`, left-pad the prompts, right-pad the answers in the
same row, and give a mask and no positions. The gradients are those of each row run alone,
unpadded, with the plain loss written out here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_v4 import small_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl_steps import Gradients, gradients_of, step_options

from posttrain.backbone import V4ForCausalLM

PROMPTS = ("hello there, how are you", "a", "12 + 4", "who is it")
STOPS = [1, *range(3, 40)]
"""So many that answers end early, at different lengths: rows are padded on both sides."""


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints whose window (7), top-k (4) and rates (4, 8) are shorter than the rows."""
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "teacher")]
    for seed, folder in enumerate(folders):
        small_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folders


def load(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is V4ForCausalLM
    model.generation_config.eos_token_id = STOPS
    return model.train()


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"per_device_train_batch_size": 4, "max_completion_length": 14, "temperature": 1.0}
    return step_options(folder, **{**own, **changes})


def train(
    trainer_class: Any, config: Any, model: Any, tokenizer: Any, **more: Any
) -> tuple[Any, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
        callbacks=[gradients],
        **more,
    )
    trainer.train()
    return trainer, gradients.found


def letters(completion_ids: list[list[int]], **row: Any) -> list[float]:
    """A reward that differs from answer to answer."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def sampled(trainer: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """The prompts and answers of the step, unpadded, and the batch that they came in."""
    (batch,) = trainer._buffered_inputs
    unpadded = [
        [ids[mask.bool()] for ids, mask in zip(batch[f"{p}_ids"], batch[f"{p}_mask"], strict=True)]
        for p in ("prompt", "completion")
    ]
    for side in unpadded:
        assert len({len(ids) for ids in side}) > 1, "every row is as long: nothing was padded"
    return unpadded[0], unpadded[1], batch


def backward_alone(
    model: Any, rows: Sequence[Tensor], losses: Sequence[Callable[[Any], Tensor]]
) -> dict[str, Tensor]:
    """Gradients of the sum of each row's loss, a function of the model, row by row; the layers'
    own losses are means over tokens."""
    num_tokens = sum(map(len, rows))
    for row, loss in zip(rows, losses, strict=True):
        model.model.auxiliary_scale = len(row) / num_tokens
        loss(model).backward()
    return gradients_of(model)


def answer_logp(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """(tokens of the answer, V): log-probabilities where each of its tokens is predicted."""
    logits = model(torch.cat([prompt, answer])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Relative 1e-4, the indexer's too, none of whose tensors is left out."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    indexer = [g for n, g in found.items() if ".indexer." in n]
    assert len(indexer) == 6
    assert all(g.any() for g in indexer)


def assert_is_ours_and_equal(reference: Any, start: Path) -> None:
    """TRL builds the reference from the saved config: neither stock nor drawn anew."""
    assert type(reference) is V4ForCausalLM
    wanted = load(start).state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in reference.state_dict().items())


def test_grpo_gives_the_gradients_of_its_rows_alone(
    folders: list[Path], tokenizer: Any, tmp_path: Path
) -> None:
    config = GRPOConfig(**options(tmp_path, num_generations=2, beta=0.1, scale_rewards="none"))
    trainer, found = train(GRPOTrainer, config, load(folders[0]), tokenizer, reward_funcs=letters)
    assert_is_ours_and_equal(trainer.ref_model, folders[0])
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    prompts, answers, batch = sampled(trainer)
    assert batch["advantages"].abs().max() > 0
    num_tokens = sum(len(a) for a in answers)

    def policy_loss(prompt: Tensor, answer: Tensor, advantage: Tensor) -> Callable[[Any], Tensor]:
        # at ratio 1 the clipped objective's gradient is REINFORCE's, and the KL's is zero
        def loss(model: Any) -> Tensor:
            logp = answer_logp(model, prompt, answer).gather(1, answer[:, None])
            return -advantage * logp.sum() / num_tokens

        return loss

    losses = [policy_loss(*row) for row in zip(prompts, answers, batch["advantages"], strict=True)]
    rows = [torch.cat(row) for row in zip(prompts, answers, strict=True)]
    assert_same_gradients(found, backward_alone(load(folders[0]), rows, losses))


def test_distillation_gives_the_gradients_of_its_rows_alone(
    folders: list[Path], tokenizer: Any, tmp_path: Path
) -> None:
    config = DistillationConfig(**options(tmp_path, beta=1.0))
    teacher = load(folders[1]).eval()
    trainer, found = train(
        DistillationTrainer, config, load(folders[0]), tokenizer, teacher_model=teacher
    )
    prompts, answers, _ = sampled(trainer)
    num_tokens = sum(len(a) for a in answers)

    def reverse_kl(prompt: Tensor, answer: Tensor) -> Callable[[Any], Tensor]:
        def loss(model: Any) -> Tensor:
            logp = answer_logp(model, prompt, answer)
            with torch.no_grad():
                logq = answer_logp(teacher, prompt, answer)
            return (logp.exp() * (logp - logq)).sum() / num_tokens

        return loss

    losses = [reverse_kl(*row) for row in zip(prompts, answers, strict=True)]
    rows = [torch.cat(row) for row in zip(prompts, answers, strict=True)]
    assert_same_gradients(found, backward_alone(load(folders[0]), rows, losses))


@pytest.mark.parametrize("bf16", [False, True])
def test_rloo_starts_from_a_reference_that_is_ours_and_equal(
    bf16: bool, folders: list[Path], tokenizer: Any, tmp_path: Path
) -> None:
    config = RLOOConfig(**options(tmp_path, num_generations=2, beta=0.05, bf16=bf16))
    trainer, found = train(RLOOTrainer, config, load(folders[0]), tokenizer, reward_funcs=letters)
    assert_is_ours_and_equal(trainer.ref_model, folders[0])
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(g.isfinite().all() for g in found.values())
    queries = [g for n, g in found.items() if n.endswith("self_attn.q_b_proj.weight")]
    assert len(queries) == 3
    assert all(g.any() for g in queries)


@pytest.mark.parametrize("kind", ["GRPO", "Distillation"])
def test_trls_default_precision_trains(
    kind: str, folders: list[Path], tokenizer: Any, tmp_path: Path
) -> None:
    if kind == "GRPO":
        config = GRPOConfig(**options(tmp_path, num_generations=2, beta=0.1, bf16=True))
        more: dict[str, Any] = {"reward_funcs": letters}
        trainer, found = train(GRPOTrainer, config, load(folders[0]), tokenizer, **more)
    else:
        config = DistillationConfig(**options(tmp_path, beta=1.0, bf16=True))
        more = {"teacher_model": load(folders[1]).eval()}
        trainer, found = train(DistillationTrainer, config, load(folders[0]), tokenizer, **more)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(g.any() for n, g in found.items() if ".indexer." in n)


def test_a_left_padded_batch_is_sampled_as_its_rows_alone(
    folders: list[Path], tokenizer: Any
) -> None:
    model = load(folders[0]).eval()
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    width = max(len(row) for row in ids)
    batch = torch.tensor([[2] * (width - len(row)) + row for row in ids])
    found = model.generate(
        batch, attention_mask=(batch != 2).long(), max_new_tokens=14, do_sample=False
    )
    for row, prompt in zip(found, ids, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0]
        answer = alone[len(prompt) :]
        assert torch.equal(row[width : width + len(answer)], answer)
