"""Whole steps that `gpu_kernels.py` times on a GPU: ours with the kernels, ours without, and stock
transformers, all with the same weights. The indexer's loss is off, since stock has none."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from shapes import LONG
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from posttrain.backbone import V4Cache, V4ForCausalLM, preset_config
from posttrain.backbone.presets import CSA, HCA, PRESETS

Run = Callable[[], float]
VOCAB = 1024

FLASH = {  # two layers of V4-Flash with an eighth of its experts
    **LONG,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "layer_types": [CSA, HCA],
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "index_n_heads": 64,
    "index_head_dim": 128,
}


@dataclass(frozen=True)
class Step:
    """`Step("train", 64, 32)`: forward and backward of 64 rows of 32 tokens."""

    kind: str
    """"train", or "decode": one token more in every row, `tokens` being there already."""
    rows: int
    tokens: int
    model: str = "tiny"
    dtype: torch.dtype = torch.bfloat16
    has_stock: bool = True

    @property
    def name(self) -> str:
        what = {"train": "forward + backward", "decode": "decode step"}[self.kind]
        return f"{what}, {self.model}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def shape(self) -> str:
        return f"{self.rows} x {self.tokens:,}"

    def variants(self, device: torch.device) -> Iterator[tuple[str, Callable[[], Run]]]:
        """What makes a function that runs the step and gives its loss (in decode the mean logit),
        for "kernels", "torch" (the same, to be called without kernels) and "stock"."""
        config, is_train = make_config(self.model), self.kind == "train"
        theirs_config = copy.deepcopy(config)  # a model writes into its config
        ids = torch.randint(3, VOCAB, (self.rows, self.tokens), device=device)
        model: Any = V4ForCausalLM(config).to(device, self.dtype)

        def stock() -> Run:
            theirs: Any = DeepseekV4ForCausalLM(theirs_config).to(device, self.dtype)
            theirs.load_state_dict(model.state_dict())
            return (train_step if is_train else stock_decode)(theirs, ids)

        for name in ("kernels", "torch"):
            yield name, lambda: (train_step if is_train else our_decode)(model, ids)
        model.zero_grad(set_to_none=True)
        if self.has_stock:
            yield "stock", stock


def steps(part: str) -> list[Step]:
    """The steps of "tiny", "long", "flash" or "decode"."""
    return {
        "tiny": [
            Step("train", 64, 32),
            Step("train", 64, 32, dtype=torch.float32),
            Step("train", 16, 128),
        ],
        "long": [
            Step("train", 1, 4096, "long"),
            Step("train", 1, 8192, "long"),
            Step("train", 1, 65536, "long", has_stock=False),
        ],
        "flash": [
            Step("train", 1, 4096, "flash"),
            Step("train", 1, 16384, "flash", has_stock=False),
        ],
        "decode": [
            Step("decode", 64, 80),
            Step("decode", 64, 1024, "flash"),
        ],
    }[part]


def make_config(preset: str) -> DeepseekV4Config:
    make: Any = preset_config
    with patch.dict(PRESETS, {"long": LONG, "flash": FLASH}):  # known here alone
        config = make(preset, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"indexer_loss_weight": 0.0})
    return config


def train_step(model: Any, ids: Tensor) -> Run:
    model.train()

    def run() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return run


def our_decode(model: Any, ids: Tensor) -> Run:
    """The same token again and again; each call is a step further."""
    model.eval()
    cache = V4Cache(model.config, len(ids), like=model.lm_head.weight)
    model.model.prefill(ids.tolist(), cache, list(range(len(ids))))
    is_live_B = torch.ones(len(ids), dtype=torch.long, device=ids.device)

    @torch.no_grad()
    def run() -> float:
        return float(model.lm_head(model.model.decode(ids[:, -1], cache, is_live_B)).float().mean())

    return run


def stock_decode(model: Any, ids: Tensor) -> Run:
    model.eval()
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def run() -> float:
        out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        return float(out.logits.float().mean())

    return run
