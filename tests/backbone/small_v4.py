"""The V4 that most laws here are tried on: every mechanism of the large ones, and a window (7), a
top-k (4) and rates (4 and 8) that are shorter than the documents."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.deepseek_v4 import DeepseekV4Config

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.presets import CSA, HCA, SLIDING

VOCAB = 61


def small_config(
    layer_types: Sequence[str] = (SLIDING, CSA, HCA), *, vocab_size: int = VOCAB, **changes: Any
) -> DeepseekV4Config:
    """The first layer routes by hash, unless `changes` says otherwise."""
    config = preset_config(
        "tiny", vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    config.update(
        {
            "layer_types": list(layer_types),
            "mlp_layer_types": ["hash_moe"] + ["moe"] * (len(layer_types) - 1),
            "num_hidden_layers": len(layer_types),
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "compress_rates": {CSA: 4, HCA: 8},
            "sliding_window": 7,
            "index_topk": 4,
            **changes,
        }
    )
    return config


def small_model(
    layer_types: Sequence[str] = (SLIDING, CSA, HCA),
    *,
    seed: int = 0,
    vocab_size: int = VOCAB,
    **changes: Any,
) -> V4ForCausalLM:
    """With norms, sinks and biases that hide no mistake; in training mode, as modules are made."""
    config = small_config(layer_types, vocab_size=vocab_size, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
