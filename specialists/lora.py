"""LoRA: a specialist of a few tensors beside its base, which teachers of one base share (PEFT)."""

from pathlib import Path
from typing import Any

import peft

from posttrain.adapters import find_base, is_adapter
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError
from specialists.config import LoraConfig

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""V4's routed experts are parameters, not modules."""


def load_with_adapter(start: Path, config: LoraConfig) -> tuple[Any, Path]:
    """The base at `start` with a fresh adapter, or with the one that `start` is; and the base.

    Raises:
        CheckpointError: the adapter at `start` has another rank or other targets than `config`.
        ValueError: PEFT found no module that `config` names.
    """
    if is_adapter(start):
        base = find_base(start)
        model: Any = peft.PeftModel.from_pretrained(load_model(base), start, is_trainable=True)
        found = model.peft_config["default"]
        if (found.r, found.target_parameters or []) != (config.rank, _experts(config)):
            raise CheckpointError(
                f"{start} is an adapter of rank {found.r} with target_parameters "
                f"{found.target_parameters}, and lora asks for rank {config.rank} with "
                f"{_experts(config)}: give both stages the same lora"
            )
        return model, base
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets,
        target_parameters=_experts(config),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(load_model(start), adapter), start


def _experts(config: LoraConfig) -> list[str]:
    return EXPERTS if config.experts else []
