"""What V4's classes share: initial values, which tensors stay float32, and how they are saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone.attention import GroupedLinear
from posttrain.backbone.routing import balanced_hash_table

NARROW = (torch.bfloat16, torch.float16)

DEFAULTS: dict[str, Any] = {
    "indexer_loss_weight": 1.0,
    "indexer_warmup": False,
    "balance_loss_weight": 0.0,
    "fake_quantization": (),
    "with_mtp": False,
    "mtp_loss_weight": 0.0,
}
"""Fields that our config has beside the stock one's. `indexer_warmup`: attention sees all entries
and the indexer learns from it, before it chooses (V3.2 report 2.1.1). `balance_loss_weight`: of the
loss in each document's experts; V4 was pre-trained with 1e-4 (balance.py). `fake_quantization`:
the parts that are rounded as serving rounds them (fake_quant.py); said before the model is made.
`mtp_loss_weight`: of the loss in what `with_mtp`'s block predicts; V4 was pre-trained with 0.3, at
last 0.1. None by default, since it trains the backbone to imitate its batch, whatever the trainer
wants from it: samples under reinforcement learning, the rejected answer under DPO, prompts. A model
made at 0 has its block frozen, so that DDP waits for no gradient of it and no weight decay eats it:
`model.mtp.requires_grad_(True)` before it is to learn after all."""

# a class from outside transformers gets no name conversion unless it is registered: stock's default
# save_pretrained and official files would be read with most weights missing
_renamings: Any = get_checkpoint_conversion_mapping("deepseek_v4")
register_checkpoint_conversion_mapping("deepseek_v4", _renamings, overwrite=True)


class V4PreTrainedModel(stock.DeepseekV4PreTrainedModel):
    """What both classes share: initial values and the names that are saved."""

    _no_split_modules = ["V4DecoderLayer", "V4MTPBlock"]
    _keep_in_fp32_modules_strict = [
        *(stock.DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict or ()),
        "enorm",
        "hnorm",
    ]
    _is_stateful = False  # our cache can be cropped, so assisted generation may take tokens back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(
            module, stock.DeepseekV4HashRouter
        ):  # stock leaves zeros: every token to expert 0
            vocab_size, top_k = module.tid2eid.shape
            table = balanced_hash_table(vocab_size, top_k, module.num_experts)
            init.copy_(module.tid2eid, table)
        elif isinstance(module, GroupedLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', in transformers' own names: the default for a subclass is a mixture of
        both layouts that the stock class reads with the embedding missing."""
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
        _count_hash_layers(Path(save_directory) / "config.json")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, for `.to`, `.half`, `.bfloat16`: what must be float32 is not narrowed."""
        strict = self._strict()
        kept = {id(t) for t in strict} | {id(t.grad) for t in strict if t.grad is not None}

        def apply(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in kept and out.dtype in NARROW else out

        return super()._apply(apply, recurse)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Only the strict list: stock would also load the compressors' projections, which official
        checkpoints have in bf16, as float32 into a float16 model, and then fail in them."""
        plan = super()._get_dtype_plan(dtype)
        return {n: d for n, d in plan.items() if n in (self._keep_in_fp32_modules_strict or ())}

    def _strict(self) -> list[Tensor]:
        """Parameters and buffers that are float32 in a model of any narrower dtype."""
        names = "|".join(map(re.escape, self._keep_in_fp32_modules_strict or ()))
        strict = re.compile(rf"(^|\.)({names})(\.|$)")
        named = (*self.named_parameters(), *self.named_buffers())
        return [t for name, t in named if strict.search(name)]

    def _widen(self) -> None:
        """`from_config(dtype=)` makes all tensors in one dtype; `from_pretrained` does not."""
        for t in self._strict():
            if t.dtype in NARROW:
                t.data = t.data.float()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers', the hash tables too: new tokens get experts of their own, balanced."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, stock.DeepseekV4HashRouter):
                gate: Any = module
                old, size = gate.tid2eid, embedding.num_embeddings
                more = balanced_hash_table(max(size - len(old), 0), gate.top_k, gate.num_experts)
                gate.tid2eid = torch.cat([old[:size], more.to(old.device)])
        self.get_decoder().vocab_size = embedding.num_embeddings
        return embedding


def _count_hash_layers(config_json: Path) -> None:
    """Say `num_hash_layers`, as official checkpoints do, instead of `mlp_layer_types`: Trainer
    resumes with the base class of all configs, which refuses V4's layer types."""
    config = json.loads(config_json.read_text())
    kinds = config.get("mlp_layer_types") or []
    num_hash = kinds.count("hash_moe")
    if kinds == ["hash_moe"] * num_hash + ["moe"] * (len(kinds) - num_hash):
        del config["mlp_layer_types"]
        config["num_hash_layers"] = num_hash
        config_json.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
