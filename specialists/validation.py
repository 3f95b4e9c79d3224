"""Which weights are a training's result: those that do best on rows kept out of it."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.tasks import Task
from rewards.score import mean_reward
from specialists.config import ScoreConfig
from specialists.lora import engine_for

SCORE = "validation_score"


class TaskScore:
    """A model's mean reward on the prompts of validation rows."""

    def __init__(
        self, tasks: Sequence[Task], prompt_ids: Iterable[str], config: ScoreConfig, *, seed: int
    ) -> None:
        """`prompt_ids` are among the tasks' prompts to train on."""
        kept = set(prompt_ids)
        self._rows = {
            task: sorted((r for r in task.train if r.id in kept), key=lambda row: row.id)[
                : config.num_prompts
            ]
            for task in tasks
        }
        self._config, self._seed = config, seed

    def __call__(self, model: Any) -> dict[str, float]:
        """`validation_score`, the mean over domains, and each domain's where there are several."""
        how, found = self._config, dict[str, float]()
        engine = engine_for(model, num_slots=how.num_slots, seed=self._seed)
        for task, rows in self._rows.items():
            if not rows:
                continue
            rollouts = engine.run(
                task.requests(rows, num_samples=how.samples_per_prompt, temperature=how.temperature)
            )
            answers = sorted(rollouts, key=lambda r: (r.prompt_id, r.sample))
            found[f"{SCORE}/{task.name}"] = mean_reward(task.score(answers))
        by_domain = found if len(found) > 1 else {}
        return {SCORE: fmean(found.values()), **by_domain}


class BestWeights(TrainerCallback):
    """Keeps what is trained of the model as it was when it did best on validation rows: its loss
    was lowest or, by score, its score highest.

    best/<step>.pt and best.json, which names it and its rank: a resumed run meets the same
    ones again, so what it finds there is what it would have found.
    """

    def __init__(
        self,
        model: Any,
        job: Job,
        *,
        score: Callable[[Any], dict[str, float]] | None = None,
        by_score: bool = False,
    ) -> None:
        """`score` gives what is logged beside the loss, `validation_score` among it."""
        self._model = model
        self._score, self._by_score = score, by_score
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
        """Logs the loss, nats a token, and the score, and keeps the weights if none were better."""
        loss = (metrics or {})["eval_loss"]
        scores = self._score(self._model) if self._score else {}
        self._metrics.log(state.global_step, state.max_steps, validation_loss=loss, **scores)
        rank = [_worst_last(scores[SCORE]), loss] if self._by_score else [loss]
        best = self._best(before=state.global_step)
        if best is not None and rank >= best:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{state.global_step}.pt"
        frozen = {n for n, p in self._model.named_parameters() if not p.requires_grad}
        found = self._model.state_dict()  # with the buffers: routing biases move in training too
        torch.save({n: t for n, t in found.items() if n not in frozen}, path)
        write_atomic(self._record, json.dumps({"step": state.global_step, "rank": rank}))
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

    def _best(self, *, before: int) -> list[float] | None:
        """The lowest rank of an earlier step; a killed attempt may have seen later ones."""
        if not self._record.exists():
            return None
        found = json.loads(self._record.read_text(encoding="utf-8"))
        return found["rank"] if found["step"] < before else None


def _worst_last(score: float) -> float:
    """A rank by the score; without one, since nobody could judge, it is behind all others."""
    return math.inf if math.isnan(score) else -score
