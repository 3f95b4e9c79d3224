"""LoRA specialists: one base in memory, adapters that take turns on it (PEFT).

They are served unmerged: a swap takes a millisecond and gives the base back to the bit, where
merging in bfloat16 moved logits by up to 1.5.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open

from posttrain.errors import CheckpointError

ADAPTERS_PER_BASE = 32
"""Kept on a base; the least recently used one makes room."""


class Adapters:
    """A model and the adapters on it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._kept: OrderedDict[Path, str] = OrderedDict()
        self._count = 0

    def use(self, adapter: Path | None) -> Any:
        """The model with this adapter alone, or with none."""
        if adapter is None:
            if self._peft is not None:
                self._peft.base_model.disable_adapter_layers()
            return self._model
        if adapter not in self._kept:
            self._load(adapter)
        self._kept.move_to_end(adapter)
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(self._kept[adapter])
        self._model.requires_grad_(False)
        return self._model

    def _load(self, adapter: Path) -> None:
        name = f"adapter{self._count}"
        self._count += 1
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._model, adapter, adapter_name=name)
        else:
            if len(self._kept) == ADAPTERS_PER_BASE:
                self._peft.delete_adapter(self._kept.popitem(last=False)[1])
            self._peft.load_adapter(adapter, adapter_name=name)
        self._peft.eval()
        self._kept[adapter] = name


def check_adapter(folder: Path, skeleton: Any) -> None:
    """Raises CheckpointError where an adapter is no LoRA, or changes the head: the learner rebuilds
    logits with its base's."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"the adapter {folder} is of type {config.get('peft_type')}, and teachers may be LoRA "
            "adapters: merge it into its base and give that checkpoint"
        )
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise CheckpointError(f"the adapter {folder} holds no adapter_model.safetensors")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    heads = [skeleton.get_output_embeddings()]
    if skeleton.all_tied_weights_keys:
        heads.append(skeleton.get_input_embeddings())
    for module in [name for name, module in skeleton.named_modules() if module in heads]:
        touched = [name for name in names if f".{module}." in name]
        if touched:
            raise CheckpointError(
                f"the adapter {folder} changes the head ({touched[0]}), and distillation rebuilds "
                "logits with the base's: train one that leaves it alone, or merge it into its base "
                "and give that checkpoint"
            )
