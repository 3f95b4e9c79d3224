"""What distillation reads of a causal language model: its last hidden states and its head.

Logits must be `scale * (hidden @ head.T + bias)` and nothing else, since the loss rebuilds them
from these.
"""

from typing import Any

import torch
from torch import Tensor

from distill.reverse_kl import Head
from posttrain.errors import CheckpointError

SOFTCAP = "final_logit_softcapping"
"""The config field of a change of the logits that no scale and bias can say."""

LOGIT_CHANGES = {SOFTCAP: None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Config fields by which some architectures change logits after the head; the harmless value."""


def hidden_states(model: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Last hidden states (B, S, H) of right-padded rows, after the final norm."""
    output = model.base_model(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
    )
    return output.last_hidden_state


def head_weight(model: Any, *, name: str) -> Tensor:
    """The head's weight (V, H). Raises CheckpointError where logits are not hidden @ head.T."""
    head = model.get_output_embeddings()
    extra = [
        field for field, harmless in LOGIT_CHANGES.items()
        if getattr(model.config, field, harmless) not in (None, harmless)
    ]  # fmt: skip
    if getattr(head, "bias", None) is not None:
        extra.append("a bias in its head")
    if extra:
        raise CheckpointError(
            f"{name} changes its logits by {', '.join(extra)}, and distillation rebuilds logits as "
            "hidden states times head: use a model without that"
        )
    return head.weight


def check_untied(model: Any) -> None:
    """Raise CheckpointError where the head is the embedding too, which is gathered."""
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        raise CheckpointError(
            "the student's head is its embedding too, which no rank can keep its rows of: set "
            "distill.learners.vocab_parallel to false, or distill.learners.strategy to ddp"
        )


@torch.no_grad()
def token_logits(hidden_NH: Tensor, head: Head, token_N: Tensor) -> Tensor:
    """The logit of one token of each row, (N,): H products a row in the place of the
    vocabulary's."""
    logit_N = torch.linalg.vecdot(hidden_NH, head.weight[token_N])
    return head.scale * (logit_N if head.bias is None else logit_N + head.bias[token_N])


def logit_scale(config: Any, *, name: str) -> float:
    """What a config multiplies the head's logits by: Cohere's `logit_scale`, Granite's division by
    `logits_scaling`. Raises CheckpointError where it does more than that."""
    if getattr(config, SOFTCAP, None) is not None:
        raise CheckpointError(
            f"{name} changes its logits by {SOFTCAP}, which the loss cannot rebuild from hidden "
            "states and head: use a teacher without that"
        )
    factor = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else divisor)
