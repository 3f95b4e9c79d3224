"""Which weights are a training's result: those that do best on rows kept out of it."""

import json
import math
import shutil
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.files import write_atomic
from posttrain.job import Job


class BestWeights(TrainerCallback):
    """Keeps what is trained of the model as it was when its validation loss was lowest.

    best/<step>.pt and best.json, which names it and its loss: a resumed run meets the same
    losses again, so what it finds there is what it would have found.
    """

    def __init__(self, model: Any, job: Job) -> None:
        self._model = model
        self._metrics = job.metrics
        self._record = job.out / "best.json"
        self._folder = job.out / "best"

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Logs the loss, nats a token, and keeps the weights if it is the lowest so far."""
        loss = (metrics or {})["eval_loss"]
        self._metrics.log(state.global_step, state.max_steps, validation_loss=loss)
        if loss >= self._best(before=state.global_step):
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{state.global_step}.pt"
        frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
        found = self._model.state_dict()  # with the buffers: routing biases move in training too
        torch.save({n: t for n, t in found.items() if n not in frozen}, path)
        write_atomic(self._record, json.dumps({"step": state.global_step, "loss": loss}))
        for other in self._folder.glob("*.pt"):
            if other != path:
                other.unlink()

    def restore(self) -> int:
        """Give the model its best weights back; returns after which step it had them."""
        step = json.loads(self._record.read_text(encoding="utf-8"))["step"]
        found = torch.load(self._folder / f"{step}.pt", weights_only=True)
        self._model.load_state_dict(found, strict=False)
        return step

    def close(self) -> None:
        """Forget them: the result stands."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def _best(self, *, before: int) -> float:
        """The lowest loss of an earlier step; a killed attempt may have seen later ones."""
        if not self._record.exists():
            return math.inf
        found = json.loads(self._record.read_text(encoding="utf-8"))
        return found["loss"] if found["step"] < before else math.inf
