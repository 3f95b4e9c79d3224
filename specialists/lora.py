"""LoRA: a specialist of a few tensors beside its base, which teachers of one base share (PEFT)."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from posttrain.adapters import ADAPTER, find_base, is_adapter
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from specialists.config import LoraConfig

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""V4's routed experts are parameters, not modules."""

SAME = ("r", "lora_alpha", "target_modules", "target_parameters")
"""What an adapter and the `lora` that trains it further have in common, in PEFT's words."""


def load_start(start: Path, config: LoraConfig | None) -> tuple[Any, Path | None]:
    """What is trained, and the checkpoint that it adapts; None where it is the whole model."""
    return load_with_adapter(start, config) if config else (load_model(start), None)


def load_with_adapter(start: Path, config: LoraConfig) -> tuple[Any, Path]:
    """The base at `start` with a fresh adapter, or with the one that `start` is; and the base.

    Raises:
        CheckpointError: the adapter at `start` has another rank, alpha or targets than `config`.
        ValueError: PEFT found no module that `config` names.
    """
    if is_adapter(start):
        base = find_base(start)
        model: Any = peft.PeftModel.from_pretrained(load_model(base), start, is_trainable=True)
        found = model.peft_config["default"]
        wanted = _adapter(config)
        for name in SAME:
            if (getattr(found, name) or None) != (getattr(wanted, name) or None):
                raise CheckpointError(
                    f"{start} is an adapter with {name} {getattr(found, name)}, and lora asks for "
                    f"{getattr(wanted, name)}: give both stages the same lora"
                )
        return model, base
    return peft.get_peft_model(load_model(start), _adapter(config)), start


def _adapter(config: LoraConfig) -> peft.LoraConfig:
    """What PEFT is asked for."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.targets,
        target_parameters=EXPERTS if config.experts else [],
        task_type="CAUSAL_LM",
    )


def engine_for(model: Any, *, num_slots: int, seed: int) -> Engine:
    """An engine that samples with what `model`, adapted or not, is at the beginning of each run."""
    if isinstance(model, peft.PeftModel):
        return AdaptedEngine(model, num_slots=num_slots, seed=seed)
    return Engine(model, num_slots=num_slots, seed=seed)


class AdaptedEngine(Engine):
    """Samples from a PEFT model: the engine reads weights as they are, so for as long as a run goes
    on the adapter is merged into them."""

    def __init__(self, model: peft.PeftModel, *, num_slots: int, seed: int) -> None:
        super().__init__(model.get_base_model(), num_slots=num_slots, seed=seed)
        self._adapted = model

    def run(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """As `Engine.run`; exhaust it before the model is used otherwise."""
        with merged(self._adapted):
            yield from super().run(requests)


@contextmanager
def merged(model: peft.PeftModel) -> Generator[None]:
    """The base as a plain model with the adapter added to its weights, and then as it was, to the
    bit. The adapted weights are held twice meanwhile."""
    base: Any = model.get_base_model()
    outermost: dict[str, LoraLayer] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and not any(name.startswith(n + ".") for n in outermost):
            outermost[name] = layer
    own: list[tuple[Tensor, Tensor]] = []
    try:
        for name, layer in outermost.items():
            plain: Any = layer
            while isinstance(plain, LoraLayer):
                parameter = _adapted_parameter(plain)
                own.append((parameter, parameter.data))
                with torch.no_grad():
                    parameter.data = parameter.data + plain.get_delta_weight(ADAPTER)  # pyright: ignore
                plain = plain.base_layer
            base.set_submodule(name, plain)
        yield
    finally:
        for name, layer in outermost.items():
            base.set_submodule(name, layer)
        for parameter, data in own:
            parameter.data = data


def _adapted_parameter(layer: Any) -> Tensor:
    """A wrapped module's weight, or the one parameter that a wrapper of parameters adapts."""
    return layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
