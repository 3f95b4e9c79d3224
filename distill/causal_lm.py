"""What distillation reads of a causal language model: its last hidden states and its head.

Logits must be `scale * (hidden @ head.T + bias)` and nothing else, since the loss rebuilds them
from these.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distill.logits import logit_scale
from distill.reverse_kl import Head
from posttrain.errors import CheckpointError

LARGEST_GAP = 0.03
"""Of the largest logit: more than the rounding of 16-bit numbers, less than any factor."""


def hidden_states(model: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Last hidden states (B, S, H) of right-padded rows, after the final norm."""
    output = model.base_model(
        input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
    )
    return output.last_hidden_state


def model_head(model: Any, *, name: str) -> Head:
    """The model's own head. Raises CheckpointError where that is not all there is to its logits."""
    layer = model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(layer.weight, bias, logit_scale(model.config.to_dict(), name=name))


@torch.no_grad()
def check_logits(model: Any, head: Head, *, name: str) -> None:
    """Raise CheckpointError where a few tokens' logits are not rebuilt from hidden states and head:
    an architecture may do to them what no config tells."""
    ids_BS = torch.arange(min(4, len(head.weight)), device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    hidden_BSH = hidden_states(model, ids_BS, torch.ones_like(ids_BS))
    wanted_BSV = model(input_ids=ids_BS, use_cache=False).logits.float()
    model.train(was_training)
    found_BSV = head.scale * nn.functional.linear(hidden_BSH, head.weight, head.bias).float()
    gap = float((found_BSV - wanted_BSV).abs().max() / wanted_BSV.abs().max())
    if gap > LARGEST_GAP:
        raise CheckpointError(
            f"{name}'s logits are not its head's of its last hidden states: they differ by "
            f"{gap:.0%} of the largest, and the loss rebuilds them so; use another architecture"
        )


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
