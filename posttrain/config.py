"""The base of every config, and the settings that several stages share. Imports no torch."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["none", "high", "max"] | Annotated[int, Field(ge=1, le=100, strict=True)]
"""How long the model thinks before it answers: not at all, at length, at any length; or a number
from 1 to 100, which the prompt names."""


class Config(BaseModel):
    """A frozen pydantic model: unknown keys are errors, the sentence under a field documents it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class OptimizerConfig(Config):
    """An optimizer and its learning-rate schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """Muon on matrices with AdamW on embeddings, head, norms and gates; or AdamW on everything."""

    learning_rate: float = Field(gt=0)
    """The peak learning rate; Muon's update is scaled to AdamW's RMS, so the two compare."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not applied to norms, biases and gates."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up: the first is at 1 / (warmup_steps + 1) of the peak."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; `linear` and `cosine` come near zero in the
    last step."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger global norm are scaled down to it."""


def learning_rate_factor(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at step 0, 1, ..., above zero at each: linear warm-up, then
    the schedule, which would reach zero at step `num_steps`."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
