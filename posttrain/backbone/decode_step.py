"""The hidden states of one decode step, in torch or, on a CPU, in compiled loops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from posttrain.backbone import decode_hyper
from posttrain.backbone.decode import DecodeContext
from posttrain.backbone.decode_norm import normed
from posttrain.backbone.host import use_host_loops


def step_hidden(model: Any, token_id_T: Tensor, context: DecodeContext) -> Tensor:
    """(T, H), normalised, of a V4Model; what the tokens leave behind is in the context's cache."""
    if use_host_loops(model.embed_tokens.weight, len(token_id_T)):
        from posttrain.backbone.host.step import run_step  # imports numba
        from posttrain.backbone.host.weights import weights_of

        if (weights := weights_of(model)) is not None:
            return run_step(model, weights, token_id_T, context)
    embeds_TH = model.embed_tokens(token_id_T)
    x_TNH = embeds_TH.unsqueeze(1).expand(-1, model.config.hc_mult, -1)
    for layer in model.layers:
        x_TNH = layer(x_TNH, token_id_T=token_id_T, context=context)
    return normed(model.norm, decode_hyper.collapse(model.hc_head, x_TNH))
