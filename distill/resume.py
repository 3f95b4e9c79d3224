"""The step checkpoint: what a killed distillation goes on from, to the same bits.

Prompts, sampling and the learning rate are functions of the step; all the rest of a run's state is
here: the student, its optimizer and torch's generator.
"""

from pathlib import Path
from typing import Any

import torch


def save_step(path: Path, *, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The state after `step` steps; replaces the earlier one whole."""
    partial = path.with_name(path.name + ".tmp")
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, partial)
    partial.replace(path)


def load_step(path: Path, *, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Restores the state in place; the number of steps that are done, 0 where there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]
