"""One real step of a TRL trainer, and the gradient that its optimizer is about to use."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback


class Gradients(TrainerCallback):
    """What the optimizer is about to use."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = gradients_of(model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a single step in which nothing is clipped."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
        "dataloader_pin_memory": False,
        **changes,
    }
