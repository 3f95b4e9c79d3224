"""What a model does to its logits behind its head, as far as its config tells; imports no torch."""

from collections.abc import Mapping
from typing import Any

from posttrain.errors import CheckpointError

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config fields of a change that no scale and bias can say: Gemma's, RecurrentGemma's, xLSTM's."""

FACTORS = ("logit_scale", "lm_head_multiplier")
"""What logits are multiplied by: Cohere's, Falcon-H1's."""

MULTIPLIED = ("hyperclovax", "hyperclovax_vision_v2")
"""Model types whose `logits_scaling` is a factor; Granite and MiniCPM3 divide by it."""


def logit_scale(config: Mapping[str, Any], *, name: str) -> float:
    """What the head's logits are multiplied by; `config` as in config.json. Raises CheckpointError
    where more is done to them than that."""
    config = config.get("text_config") or config
    for field in CAPS:
        if config.get(field) is not None:
            raise CheckpointError(
                f"{name} changes its logits by {field}, which the loss cannot rebuild from hidden "
                "states and head: use a model without that"
            )
    scale = 1.0
    if config.get("model_type") != "mpt":  # which reads its logit_scale nowhere
        for field in FACTORS:
            scale *= config.get(field) or 1.0
    scaling = config.get("logits_scaling") or 1.0
    return scale * scaling if config.get("model_type") in MULTIPLIED else scale / scaling
