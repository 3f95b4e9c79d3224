"""A model's weights as arrays, made once and made again where they are no longer the model's."""

from __future__ import annotations

from itertools import chain, repeat
from operator import contains, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone.attention import GroupedLinear, V4Attention
from posttrain.backbone.decode_norm import is_bare
from posttrain.backbone.experts import V4Experts, V4SharedExpert, V4SparseMoeBlock
from posttrain.backbone.host import arrays
from posttrain.backbone.host.arrays import (
    NO_COMPRESSOR,
    Attention,
    Compressor,
    Connection,
    Experts,
)
from posttrain.backbone.hyper_connections import V4HyperConnection, V4HyperHead
from posttrain.backbone.layer import V4DecoderLayer
from posttrain.backbone.norm import V4RMSNorm, V4UnweightedRMSNorm


class LayerWeights(NamedTuple):
    """One layer's."""

    attn_hc: Connection
    attention: Attention
    compressor: Compressor
    index_keys: Compressor
    ffn_hc: Connection
    experts: Experts


class Weights:
    """All layers', in the memory of the model's parameters: what an optimizer writes there is read
    by the next step."""

    def __init__(self, model: Any) -> None:
        """Of a V4Model that `is_plain`."""
        self.layers = [_layer(layer) for layer in model.layers]
        self.head = arrays.head(model.hc_head, model.norm)
        self.inv_freq_r = arrays.array(model.rotary_emb.compress_inv_freq)
        modules = [*model.layers.modules(), *model.hc_head.modules(), model.norm]
        self.size = sum(x.numel() for x in model.layers.parameters())
        self._config = model.config
        self._own = [module.__dict__ for module in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        owners = [own for m in modules for own in (m._modules, m._parameters, m._buffers)]
        slots = [
            (owner, name, x)
            for owner in (model._modules, *owners)
            for name, x in owner.items()
            if x is not None
        ]
        self._owners, self._names, self._found = zip(*slots, strict=True)
        self._tensors = [x for x in self._found if isinstance(x, Tensor)]
        self._places = [x.data_ptr() for x in self._tensors]

    def is_current(self) -> bool:
        """Whether the model still has these tensors at these places, these modules, no hooks."""
        return (
            not any(self._hooks)
            and not any(map(contains, self._own, repeat("forward")))
            and not self._config.fake_quantization
            and all(map(is_, self._found, map(dict.get, self._owners, self._names)))
            and self._places == [x.data_ptr() for x in self._tensors]
        )


_weights: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()


def weights_of(model: Any) -> Weights | None:
    """None: the model has something that the loops do not know."""
    found = _weights.get(model)
    if found is None or not found.is_current():
        _weights.pop(model, None)
        if not is_plain(model):
            return None
        found = _weights[model] = Weights(model)
    return found


def _layer(layer: Any) -> LayerWeights:
    module, block = layer.self_attn, layer.mlp
    compressor = index = NO_COMPRESSOR
    if module.compressor is not None:
        compressor = arrays.compressor(module.compressor)
        if hasattr(module.compressor, "indexer"):
            index = arrays.compressor(module.compressor.indexer)
    return LayerWeights(
        arrays.connection(layer.attn_hc, layer.input_layernorm),
        arrays.attention(module),
        compressor,
        index,
        arrays.connection(layer.ffn_hc, layer.post_attention_layernorm),
        arrays.experts(block),
    )


def is_plain(model: Any) -> bool:
    """Whether a V4Model has nothing that the loops do not know: no adapters, packed experts or
    hooks, no serving's rounding, a router's usual scores, all in float32."""
    config = model.config
    if config.fake_quantization or config.scoring_func != "sqrtsoftplus":
        return False
    parts = model.layers, model.hc_head, model.norm
    if not all(_is_plain_tensor(x) for x in chain(*(part.parameters() for part in parts))):
        return False
    ends = (V4RMSNorm, model.norm), (V4HyperHead, model.hc_head)
    if not all(type(module) is kind and is_bare(module) for kind, module in ends):
        return False
    return all(_is_plain(layer) for layer in model.layers)


def _is_plain_tensor(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and not isinstance(x, DTensor)


def _is_plain(layer: Any) -> bool:
    attention, block = layer.self_attn, layer.mlp
    compressors = [x for x in (attention.compressor,) if x is not None]
    indexers = [x.indexer for x in compressors if hasattr(x, "indexer")]
    shared = block.shared_experts
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_a_norm, attention.kv_norm]
    linear = [attention.q_a_proj, attention.q_b_proj, attention.kv_proj, attention.o_b_proj]
    for module in (*compressors, *indexers):
        norms.append(module.kv_norm)
        linear += [module.kv_proj, module.gate_proj]
    for indexer in indexers:
        linear += [indexer.q_b_proj, indexer.scorer.weights_proj]
    linear += [shared.gate_proj, shared.up_proj, shared.down_proj]
    kinds = [(nn.Linear, x) for x in linear] + [(V4RMSNorm, x) for x in norms]
    kinds += [
        (V4UnweightedRMSNorm, attention.q_b_norm),
        (GroupedLinear, attention.o_a_proj),
        (V4Experts, block.experts),
        (V4SharedExpert, shared),
        (V4SparseMoeBlock, block),
        (stock.DeepseekV4HashRouter if block.is_hash else stock.DeepseekV4TopKRouter, block.gate),
        (V4Attention, attention),
        (V4DecoderLayer, layer),
        *[(V4HyperConnection, x) for x in (layer.attn_hc, layer.ffn_hc)],
    ]
    return all(x.bias is None for x in linear) and all(
        type(module) is kind and is_bare(module) for kind, module in kinds
    )
