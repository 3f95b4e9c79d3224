from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.checkpoints import load_model
from posttrain.job import Job
from posttrain.metrics import Metrics
from specialists import sft, training
from specialists.config import SftConfig


def half_written(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")


def test_the_newest_marked_step_checkpoint_counts_and_unmarked_ones_go(tmp_path: Path) -> None:
    for step in (9, 20, 100):
        half_written(tmp_path / f"checkpoint-{step}")
    assert training.newest_complete(tmp_path) is None
    assert not list(tmp_path.iterdir())
    for step in (9, 20, 100):
        half_written(tmp_path / f"checkpoint-{step}")
    for step in (9, 20):
        (tmp_path / f"checkpoint-{step}" / training.MARK).write_text(f"{step}\n")
    assert training.newest_complete(tmp_path) == tmp_path / "checkpoint-20"
    assert not (tmp_path / "checkpoint-100").exists()


def test_a_result_that_stands_is_not_made_again(new_job: Callable[..., Job]) -> None:
    job = new_job("done")
    assert training.prepare(job)
    (job.out / training.RESULT).mkdir()
    half_written(job.out / training.STEPS / "checkpoint-4")
    assert not training.prepare(job)
    assert not (job.out / training.STEPS).exists()


@pytest.mark.parametrize("wrong", [{"loss": float("nan")}, {"grad_norm": float("inf")}])
def test_what_is_not_finite_is_raised_and_not_logged(
    tmp_path: Path, wrong: dict[str, float]
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", stage="grpo/code")
    callback = training.MetricsCallback(metrics, dict)
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5, use_cpu=True)
    state, control = TrainerState(global_step=7, max_steps=9), TrainerControl()
    callback.on_log(arguments, state, control, logs={"loss": 1.0, "grad_norm": 2.0})
    (name,) = wrong
    with pytest.raises(FloatingPointError, match=f"grpo/code: {name} is .* in step 7 of 9: lower"):
        callback.on_log(arguments, state, control, logs={"loss": 1.0, "grad_norm": 2.0, **wrong})
    assert len(metrics.records()) == 1


class IndexersGradients(TrainerCallback):
    """Those of the layers' own loss, as the optimizer is about to use them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.found = {name: p.grad.clone() for name, p in named if ".indexer." in name}


def test_microbatches_change_no_indexers_gradient(
    start: Path, tokenizer: Any, new_job: Callable[..., Job]
) -> None:
    ids = torch.randint(3, len(tokenizer), (3, 24), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    found: list[dict[str, Tensor]] = []
    for rows_at_once in (3, 1):
        job, gradients = new_job(f"rows-{rows_at_once}"), IndexersGradients()
        model: Any = load_model(start / "checkpoint")
        model.config.indexer_loss_weight = 1.0
        options = {"num_steps": 1, "rows_per_step": 3, "rows_per_microbatch": rows_at_once}
        trainer = sft.build_trainer(model, tokenizer, data, SftConfig.model_validate(options), job)
        trainer.add_callback(gradients)
        training.run(trainer, job, tokenizer)
        found.append(gradients.found)
    whole, parts = found
    assert len(whole) == 6
    for name, gradient in whole.items():
        assert gradient.any(), name
        atol = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=atol, msg=name)
