"""config.json of the official layout to transformers' DeepseekV4Config, and back.

They differ in four things: `compress_ratios`, one number a layer and MTP block (0 sliding, 4 CSA,
anything else HCA at that rate); `num_hash_layers`, how many layers from the first route by hash;
`qk_rope_head_dim`; and `rope_scaling`, YaRN for the compressed layers alone, without its factor on
the attention. transformers' own config reads three of them and writes none.
"""

from __future__ import annotations

from typing import Any

from transformers.models.deepseek_v4 import DeepseekV4Config

from posttrain.backbone.official_files import OfficialError
from posttrain.backbone.presets import CSA, HCA, SLIDING

CSA_RATE = 4
"""The official code takes a ratio of 4 for CSA; there is no other way to say so."""

SAME = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "q_lora_rank",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "max_position_embeddings",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "swiglu_limit",
    "sliding_window",
    "o_groups",
    "o_lora_rank",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "num_nextn_predict_layers",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
)
"""Fields that both know by the same name."""

NEW: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "topk_method": "noaux_tc",
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}
"""What the release says beside its shapes."""

NEEDED = ("num_hidden_layers", "compress_ratios", "num_hash_layers", "head_dim", "qk_rope_head_dim")


def from_official(found: dict[str, Any]) -> DeepseekV4Config:
    """The model's configuration.

    Raises:
        OfficialError: a field is missing, or says what V4 has no layer for.
    """
    ratios, rate = _ratios(found)
    num_layers, num_hash = len(ratios), min(found["num_hash_layers"], len(ratios))
    share = found["qk_rope_head_dim"] / found["head_dim"]
    theta: float = found.get("rope_theta", 10000.0)
    compress_theta: float = found.get("compress_rope_theta", 160000.0)
    return DeepseekV4Config(
        **{name: found[name] for name in SAME if name in found},
        layer_types=[{0: SLIDING, CSA_RATE: CSA}.get(ratio, HCA) for ratio in ratios],
        compress_rates={CSA: CSA_RATE, HCA: rate},
        mlp_layer_types=["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash),
        partial_rotary_factor=share,
        rope_theta=theta,
        compress_rope_theta=compress_theta,
        rope_parameters={
            "main": {
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": share,
            },
            "compress": {
                **_yarn(found.get("rope_scaling")),
                "rope_theta": compress_theta,
                "partial_rotary_factor": share,
            },
        },
    )


def to_official(config: DeepseekV4Config) -> dict[str, Any]:
    """The fields of config.json that the model's configuration decides.

    Raises:
        OfficialError: a layout that the official code has no words for.
    """
    layers, hashes = config.layer_types or [], config.mlp_layer_types or []
    rates: dict[str, int] = {SLIDING: 0, **(config.compress_rates or {})}
    num_hash = hashes.count("hash_moe")
    if CSA in layers and rates[CSA] != CSA_RATE:
        raise OfficialError(f"the official layout has CSA at 4, this model at {rates[CSA]}")
    if HCA in layers and rates[HCA] in (0, CSA_RATE):
        raise OfficialError(f"an HCA rate of {rates[HCA]} reads as another kind of layer")
    if "hash_moe" in hashes[num_hash:]:
        raise OfficialError("the official layout has hash layers only from the first on")
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    fields = {name: getattr(config, name) for name in SAME}
    fields["compress_ratios"] = [
        *(rates[kind] for kind in layers),
        *[0] * config.num_nextn_predict_layers,
    ]
    fields["num_hash_layers"] = num_hash
    fields["qk_rope_head_dim"] = round(config.head_dim * (config.partial_rotary_factor or 0))
    fields["rope_theta"] = rope["main"]["rope_theta"]
    fields["compress_rope_theta"] = rope["compress"]["rope_theta"]
    fields["rope_scaling"] = _scaling(rope["compress"])
    return fields


def changed_config(template: dict[str, Any] | None, config: DeepseekV4Config) -> dict[str, Any]:
    """config.json for a model: the template's, with what differs in the model; a whole new one
    where there is no template. The template itself where nothing differs."""
    fields = to_official(config)
    if template is None:
        return {**NEW, **fields}
    before = to_official(from_official(template))
    changed = {name: value for name, value in fields.items() if value != before[name]}
    return {**template, **changed} if changed else template


def _ratios(found: dict[str, Any]) -> tuple[list[int], int]:
    """compress_ratios without the MTP blocks', and HCA's rate."""
    missing = [name for name in NEEDED if found.get(name) is None]
    if missing:
        raise OfficialError(f"config.json lacks {', '.join(missing)}: is it the official layout's?")
    num_layers: int = found["num_hidden_layers"]
    ratios: list[int] = found["compress_ratios"][:num_layers]
    rates = sorted(set(ratios) - {0, CSA_RATE})
    if len(ratios) < num_layers or len(rates) > 1:
        raise OfficialError(
            f"config.json's compress_ratios has {len(ratios)} entries for {num_layers} layers and "
            f"the HCA rates {rates}: one entry a layer and one HCA rate are needed"
        )
    return ratios, rates[0] if rates else 128


def _yarn(scaling: dict[str, Any] | None) -> dict[str, Any]:
    if not scaling:
        return {"rope_type": "default"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    parameters = {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
    # V4 multiplies cos and sin by nothing; without the field transformers derives 1.277
    factor = {"attention_factor": 1.0} if kind == "yarn" else {}
    return {**factor, **parameters, "rope_type": kind}


def _scaling(compress: dict[str, Any]) -> dict[str, Any] | None:
    if compress.get("rope_type", "default") == "default":
        return None
    own = ("rope_type", "rope_theta", "partial_rotary_factor", "attention_factor")
    return {**{k: v for k, v in compress.items() if k not in own}, "type": compress["rope_type"]}
