"""Every override of private methods of TRL and transformers, and what it is for.

tests/specialists/test_trl_border.py says in words what moved when they change.

What TRL does by its own options is set in training.py, sft.py and grpo.py, not here.
"""

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from posttrain.adapters import ADAPTER
from posttrain.errors import CheckpointError
from specialists.choices import ROUTES, SUPPORT, expert_choices, kept_logps, tensors_of


class Ours:
    """What both trainers do otherwise: telemetry, model cards, loading a step checkpoint."""

    model: Any

    def _send_telemetry(self) -> None:
        """TRL tells the hub about every run, unless environment variables forbid it."""

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """TRL and transformers write a README.md; the run's report says more."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a step checkpoint, all of them or an error.

        transformers 5.23 cannot: it reads config.json with the base class of all configs, which
        refuses V4's layer types, and it takes missing weights for a mere warning.
        """
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore
            return
        tensors: dict[str, Tensor] = {}
        for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
            tensors |= load_file(file)
        found = model.load_state_dict(tensors, strict=False)
        missing = set(found.missing_keys) - set(getattr(model, "all_tied_weights_keys", ()))
        if missing or found.unexpected_keys:
            raise CheckpointError(
                f"{resume_from_checkpoint} does not fit the model: missing {sorted(missing)}, "
                f"unexpected {found.unexpected_keys}; delete it to go on from an earlier one"
            )


class OurSFTTrainer(Ours, SFTTrainer):
    """trl.SFTTrainer on V4."""


class OurGRPOTrainer(Ours, GRPOTrainer):
    """trl.GRPOTrainer on V4, which replays what the sampler chose (choices.py), takes the
    denominator of the ratio from the sampler, and bounds and measures how far it is from the
    learner; TRL does either with vLLM only.

    Logged, and averaged over a step's microbatches: `sampler_gap`, the mean over own tokens of
    |log p (learner) - log p (sampler)| in nats, near 1e-6 where rounding alone is between them;
    `sampler_gap_max`, its maximum; `tokens_masked` by `max_ratio` and `rows_masked` by
    off_policy_mask_threshold, as shares.
    """

    max_ratio: float | None = None
    """A token whose ratio is above this, or below its inverse, has no gradient."""

    _chosen: dict[str, Tensor]
    """Of the rows at hand."""
    _sampler_logp: Tensor
    _is_sampling = False
    _learner_logp: Tensor | None = None

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        prompt_ids, responses, logps, extra = found[0], found[1], found[4], found[5]
        assert logps is not None, "rollout_func gives log-probabilities"
        fields = {name: extra.pop(name) for name in (ROUTES, SUPPORT) if name in extra}
        device = self.accelerator.device
        tensors = tensors_of(fields, prompt_ids, responses)
        self._chosen = {name: tensor.to(device) for name, tensor in tensors.items()}
        logp = pad_sequence([torch.tensor(row) for row in logps], batch_first=True)
        self._sampler_logp = logp.to(device)
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._is_sampling = True
        output = super()._generate_and_score_completions(inputs)
        self._is_sampling = False
        return {**output, **self._chosen}

    def _get_per_token_logps_and_entropies(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        is_policy = not self._is_reference(model)
        if is_policy and self._is_sampling:  # of the policy that sampled: no need to compute it
            return self._sampler_logp, None, None
        routes = self._chosen.get(ROUTES) if is_policy else None
        support = self._chosen.get(SUPPORT)
        logps: list[Tensor] = []
        entropies: list[Tensor | None] = []
        size = batch_size or len(input_ids)
        for part in (slice(i, i + size) for i in range(0, len(input_ids), size)):
            ids, mask, run = input_ids[part], attention_mask[part], model
            if routes is not None:
                run = partial(model, replay_routes=expert_choices(routes[part], mask))
            if support is not None:
                with self.accelerator.autocast():
                    logp, entropy = kept_logps(
                        run, ids, mask, support[part], temperature=self.temperature
                    )
            else:
                logp, entropy, _ = super()._get_per_token_logps_and_entropies(
                    run, ids, mask, logits_to_keep, compute_entropy=compute_entropy, **options
                )
            logps.append(logp)
            entropies.append(entropy)
        logp = torch.cat(logps)
        if torch.is_grad_enabled():
            self._learner_logp = logp.detach()
            if self.max_ratio is not None:
                logp = torch.where(self._is_far(self._learner_logp), logp.detach(), logp)
        found = [entropy for entropy in entropies if entropy is not None]
        return logp, torch.cat(found) if compute_entropy else None, None

    def _is_reference(self, model: Any) -> bool:
        """A model of its own or, of an adapter, the same model with another adapter at work."""
        plain = self.accelerator.unwrap_model(model)
        if isinstance(plain, PeftModel):
            return plain.active_adapter != ADAPTER
        return model is self.ref_model

    def _is_far(self, logp: Tensor) -> Tensor:
        assert self.max_ratio is not None
        return (logp - self._sampler_logp).abs() > math.log(self.max_ratio)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self._chosen = {name: inputs[name] for name in (ROUTES, SUPPORT) if name in inputs}
        self._sampler_logp = inputs["sampling_per_token_logps"]
        loss = super()._compute_loss(model, inputs)
        assert self._learner_logp is not None
        is_own = inputs["completion_mask"] * inputs["tool_mask"]
        gap = (self._learner_logp - self._sampler_logp).abs() * is_own
        metrics = self._metrics["train"]
        metrics["sampler_gap"].append((gap.sum() / is_own.sum().clamp(min=1)).item())
        metrics["sampler_gap_max"].append(gap.max().item())
        if self.max_ratio is not None:
            far = self._is_far(self._learner_logp) * is_own
            metrics["tokens_masked"].append((far.sum() / is_own.sum().clamp(min=1)).item())
        if self.off_policy_mask_threshold is not None:
            kept = self.get_off_policy_mask(
                inputs["advantages"][:, None],
                self._learner_logp,
                self._sampler_logp,
                is_own,
                self.off_policy_mask_threshold,
            )
            metrics["rows_masked"].append(1 - kept.float().mean().item())
        self._learner_logp = None
        return loss


@contextmanager
def known_warnings() -> Generator[None]:
    """Silences what TRL 1.16 is known to warn of and we can do nothing about."""
    with warnings.catch_warnings():
        for message in ("You are using 'rollout_func'", "`is_gradient_checkpointing` is dep"):
            warnings.filterwarnings("ignore", message=message)
        yield
