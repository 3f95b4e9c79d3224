"""Students whose logits are more than hidden states times a matrix."""

from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bias": (PhiForCausalLM, PhiConfig, {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "tied and scaled": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.4}),
    "divided": (
        GraniteForCausalLM,
        GraniteConfig,
        {"logits_scaling": 2.5, "tie_word_embeddings": False},
    ),
    "multiplied": (HyperCLOVAXForCausalLM, HyperCLOVAXConfig, {"logits_scaling": 2.5}),
}


def headed(kind: str, seed: int, vocab_size: int) -> Any:
    """A student of a kind, with a head that has opinions."""
    model_class, config_class, options = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(vocab_size=vocab_size, **SMALL, **options)).eval()
        layer = model.get_output_embeddings()
        layer.weight.data *= 8
        if layer.bias is not None:
            layer.bias.data.normal_()
    return model
