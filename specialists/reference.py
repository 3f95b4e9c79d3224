"""The reference that GRPO's KL is taken to, renewed now and then.

TRL's own `sync_ref_model` copies parameters and no buffers, among which are V4's routing biases,
and a resumed run would begin with the first reference again.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.adapters import ADAPTER
from posttrain.errors import CheckpointError

FILE = "reference.safetensors"


class ReferenceRefresh(TrainerCallback):
    """Every `every` optimizer steps the reference becomes the policy of that moment; step
    checkpoints hold it. To be called before a checkpoint is marked as whole."""

    def __init__(self, trainer: Any, every: int) -> None:
        self._trainer = trainer
        self._every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The reference of a run that goes on. Raises CheckpointError where it is not there."""
        if state.global_step < self._every or self._reference is None:
            return
        path = _folder(args, state) / FILE
        if not path.exists():
            raise CheckpointError(
                f"{path} is not there, and the reference was renewed before step "
                f"{state.global_step}: delete {path.parent} to go on from an earlier step"
            )
        load_model(self._reference, path)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Copies parameters and buffers, when it is time."""
        if state.global_step % self._every:
            return
        policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if self._reference is None:
            for name, parameter in policy.named_parameters():
                if ".ref." in name:
                    own = policy.get_parameter(name.replace(".ref.", f".{ADAPTER}."))
                    parameter.data.copy_(own.data)
        else:
            self._reference.load_state_dict(policy.state_dict())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The reference beside the policy."""
        if state.global_step >= self._every and self._reference is not None:
            save_model(self._reference, str(_folder(args, state) / FILE))

    @property
    def _reference(self) -> Any:
        """None where it is the policy's base with an adapter that TRL calls `ref`: that one's
        checkpoints are transformers' own."""
        found = self._trainer.ref_model
        return None if found is None else self._trainer.accelerator.unwrap_model(found)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
