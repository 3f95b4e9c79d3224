"""What pretraining, SFT and GRPO share: arguments, metrics, and going on after a kill.

    out/steps/checkpoint-20/complete    a step checkpoint, marked when all of it was written
    out/checkpoint/                     the result; there is no out/steps once it stands

A resumed run gives the same bits as an undisturbed one: the order of the rows is fixed beforehand
(rows.py), and weights, optimizer, schedule and random states come from the step checkpoint.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy

from posttrain.adapters import save_adapter
from posttrain.checkpoints import save_checkpoint
from posttrain.config import OptimizerConfig, learning_rate_factor
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.optim import build_optimizer
from specialists.trl_border import known_warnings
from specialists.validation import BestWeights

STEPS = "steps"
RESULT = "checkpoint"
MARK = "complete"

METRIC_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "kl": "kl",
    "mean_token_accuracy": "token_accuracy",
    "sampler_gap": "sampler_gap",
    "sampler_gap_max": "sampler_gap_max",
    "clip_ratio/region_mean": "clipped",
    "tokens_masked": "tokens_masked",
    "rows_masked": "rows_masked",
}
"""What the trainers log -> what our metrics call it; the rest is left out."""

logger = logging.getLogger(__name__)


def prepare(job: Job) -> bool:
    """Set threads and seeds; False if an earlier attempt has already written the result."""
    torch.set_num_threads(job.num_threads)
    set_seed(job.seed)
    is_done = (job.out / RESULT).exists()
    if is_done:
        shutil.rmtree(job.out / STEPS, ignore_errors=True)
    return not is_done


def shared_arguments(
    job: Job,
    *,
    num_steps: int,
    rows_per_microbatch: int,
    microbatches: int,
    checkpoint_every: int,
    optimizer: OptimizerConfig,
) -> dict[str, Any]:
    """Keyword arguments for any TrainingArguments: one pass over a data set already in order."""
    has_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(job.out / STEPS),
        "seed": job.seed,
        "max_steps": num_steps,
        "per_device_train_batch_size": rows_per_microbatch,
        "gradient_accumulation_steps": microbatches,
        "activation_checkpointing": False,
        "learning_rate": optimizer.learning_rate,
        "max_grad_norm": optimizer.max_grad_norm,
        "use_cpu": not has_gpu,
        "bf16": False,
        "dataloader_num_workers": 0,  # rows are token ids already: a worker process costs more
        "dataloader_pin_memory": has_gpu,
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": checkpoint_every,
        "save_total_limit": 2,  # the newest may be unfinished when it pushes out the oldest
    }


def optimizer_for(
    model: nn.Module, config: OptimizerConfig, *, num_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The configured optimizer over `model` with its schedule: a trainer's `optimizers`."""
    optimizer = build_optimizer(
        model,
        name=config.name,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    factor = partial(learning_rate_factor, num_steps=num_steps, config=config)
    return optimizer, LambdaLR(optimizer, factor)


def run(
    trainer: Trainer,
    job: Job,
    tokenizer: Any,
    *,
    read_metrics: Callable[[], dict[str, float]] = dict,
    facts: Mapping[str, float] | None = None,
    best: BestWeights | None = None,
    base: Path | None = None,
) -> None:
    """Train from the newest step checkpoint, if there is one, and write the result.

    Args:
        trainer: made with `shared_arguments`.
        tokenizer: saved beside the weights.
        read_metrics: gives the last step's metrics beyond the trainer's own.
        facts: numbers logged once, as step 0.
        best: says which weights are the result; None: the last.
        base: the checkpoint that the trainer's model adapts; the result is an adapter then.
    """
    for callback in (CompletionMark(), MetricsCallback(job.metrics, read_metrics)):
        trainer.add_callback(callback)
    if best:
        trainer.add_callback(best)
    trainer.remove_callback(PrinterCallback)
    newest = newest_complete(job.out / STEPS)
    if newest is None:
        job.metrics.rewind(-1)
        job.metrics.log(0, trainer.args.max_steps, **(facts or {}))
    else:
        logger.info("going on from %s", newest)
        job.metrics.rewind(step_of(newest))
    with known_warnings():
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    if best:
        logger.info("the result is the weights after step %d", best.restore())
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if base:
        save_adapter(model, tokenizer, job.out / RESULT, base=base)
    else:
        save_checkpoint(model, tokenizer, job.out / RESULT)
    shutil.rmtree(job.out / STEPS, ignore_errors=True)
    if best:
        best.close()


def step_of(checkpoint: Path) -> int:
    """`.../checkpoint-20` -> 20."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_complete(steps: Path) -> Path | None:
    """The newest step checkpoint that was written to its end; the others are deleted."""
    found = sorted(steps.glob("checkpoint-*"), key=step_of)
    complete = [path for path in found if (path / MARK).exists()]
    for path in set(found) - set(complete):
        logger.info("%s was not written to its end: deleted", path)
        shutil.rmtree(path)
    return complete[-1] if complete else None


class CompletionMark(TrainerCallback):
    """Marks a step checkpoint once it is whole, and saves none after the last step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The result itself is about to be written: a step checkpoint would serve nobody; but the
        last weights may be the best."""
        if state.global_step >= state.max_steps:
            control.should_save = False
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when every file of the checkpoint is there."""
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomic(folder / MARK, f"{state.global_step}\n")


class MetricsCallback(TrainerCallback):
    """Writes each step's metrics to the stage's metrics.jsonl."""

    def __init__(self, metrics: Metrics, read_metrics: Callable[[], dict[str, float]]) -> None:
        self.metrics = metrics
        self.read_metrics = read_metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log the step; the summary at the end of training, which has no loss, is left out.

        Raises FloatingPointError, before a checkpoint is written, where the loss or its gradient is
        not finite.
        """
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(
                    f"{self.metrics.stage}: {name} is {logs[name]} in step {state.global_step} of "
                    f"{state.max_steps}: lower optimizer.learning_rate (now "
                    f"{args.learning_rate:g}) or lengthen its warmup_steps, and run again"
                )
        known = {ours: logs.get(name) for name, ours in METRIC_NAMES.items()}
        values = {name: value for name, value in known.items() if value is not None}
        self.metrics.log(state.global_step, state.max_steps, **values, **self.read_metrics())
