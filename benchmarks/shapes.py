"""Models that benchmarks measure beside the presets."""

from posttrain.backbone.presets import CSA, HCA, PRESETS

LONG = {  # hidden 256, 8 heads of 64, window 128, CSA 4 top-512, HCA 128
    **PRESETS["tiny"],
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "head_dim": 64,
    "q_lora_rank": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "compress_rates": {CSA: 4, HCA: 128},
    "max_position_embeddings": 131072,
}
