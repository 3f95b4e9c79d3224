"""What serving rounds, felt in training: quantisation-aware training by parts (V4 report 5.2.1).

The config's `fake_quantization` names the parts, each rounded wherever it is used, in training,
sampling and scoring alike, with straight-through gradients (fp4.py):

    experts      the routed experts' weights as MXFP4, from their own precision
    indexer      its queries and keys, Hadamard-rotated, as MXFP4
    kv           window keys and compressed entries as FP8, 64 at a time, the RoPE channels kept
    activations  the inputs of the matrices that serving keeps in FP8 or FP4, 128 at a time

An FP8 or FP4 sampler then has the distribution that was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.backbone.fp4 import fake_fp8_activation, fake_fp8_blocks, fake_indexer_fp4

PARTS = ("experts", "indexer", "kv", "activations")

MATRICES = (
    *("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj", "down_proj"),
    *("e_proj", "h_proj"),  # of the block of multi-token prediction
)
"""Linear modules whose inputs serving rounds. The compressors' own kv_proj and gate_proj are kept
in bf16 by official checkpoints, and so are their inputs."""


def rounds(config: Any, part: str) -> bool:
    """Whether `part` is rounded. Raises ValueError where the config names an unknown part."""
    parts = getattr(config, "fake_quantization", ())
    if unknown := set(parts) - set(PARTS):
        raise ValueError(
            f"fake_quantization names {sorted(unknown)}: the parts are {', '.join(PARTS)}"
        )
    return part in parts


def rounded_kv(config: Any, kv: Tensor) -> Tensor:
    """Keys = values (..., d) as an FP8 cache gives them back."""
    if not rounds(config, "kv"):
        return kv
    num_still = kv.shape[-1] - config.qk_rope_head_dim
    return torch.cat([fake_fp8_blocks(kv[..., :num_still]), kv[..., num_still:]], dim=-1)


def rounded_index(config: Any, x: Tensor) -> Tensor:
    """The indexer's queries or keys (..., c) as serving compares them."""
    return fake_indexer_fp4(x) if rounds(config, "indexer") else x


def round_inputs(model: nn.Module, config: Any) -> None:
    """Have the matrices of `model` that serving keeps in FP8 take rounded inputs, where the config
    asks for it; the routed experts look after themselves (experts.py)."""
    if not rounds(config, "activations"):
        return
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        is_compressors = parent.endswith(("compressor", "indexer")) and own != "q_b_proj"
        if own in MATRICES and isinstance(module, nn.Linear) and not is_compressors:
            module.register_forward_pre_hook(_round_input)


def _round_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_fp8_activation(args[0]), *args[1:])
