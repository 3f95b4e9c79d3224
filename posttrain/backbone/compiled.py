"""The decode step compiled as one graph, with static shapes: for models whose layers are so small
that most of an eager step is Python and dispatch.

Legend: B slots, N streams, H hidden size, E experts, I their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import context_of, decode_attention
from posttrain.backbone.fake_quant import rounds
from posttrain.backbone.routing import route


def compiled_decode(
    model: Any, *, backend: str = "inductor"
) -> Callable[[Tensor, V4Cache, Tensor], Tensor]:
    """`V4Model.decode` compiled as one graph: (token_B, cache, is_live_B) -> hidden (B, H).

    It is compiled anew whenever the room of the cache grows, so `reserve` what rows may need. Call
    this again when the model itself changed (dtype, device, adapters): only tensors of the cache
    and the batch are looked at in each step, since a look at all modules takes a fifth of it.

    It takes down no routes: that is `V4Model.decode`'s.

    Raises ValueError where the config has activations rounded.
    """
    guards: Any = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    if rounds(model.config, "activations"):
        raise ValueError("a compiled step rounds no activations: sample by V4Model.decode")
    step = torch.compile(
        _static_step, fullgraph=True, dynamic=False, backend=backend, options=guards
    )

    @torch.no_grad()
    def decode(token_B: Tensor, cache: V4Cache, is_live_B: Tensor) -> Tensor:
        cache.reserve(cache.longest() + 1)
        hidden_BH = step(model, token_B, cache)
        cache.advance(is_live_B)
        return hidden_BH

    return decode


def _static_step(model: Any, token_B: Tensor, cache: V4Cache) -> Tensor:
    """All layers over one token a slot; V4DecoderLayer's steps, with every expert over every
    token, since how many tokens an expert gets is a value."""
    context = context_of(model, cache, is_static=True)
    embeds_BH = model.embed_tokens(token_B)
    x_BNH = embeds_BH.unsqueeze(1).expand(-1, model.config.hc_mult, -1).contiguous()
    for layer in model.layers:
        collapsed, write = layer.attn_hc(x_BNH)
        x_BNH = write(decode_attention(layer.self_attn, layer.input_layernorm(collapsed), context))
        collapsed, write = layer.ffn_hc(x_BNH)
        x_BNH = write(_all_experts(layer.mlp, layer.post_attention_layernorm(collapsed), token_B))
    return model.norm(model.hc_head(x_BNH.unsqueeze(0)).squeeze(0))


def _all_experts(mlp: Any, x_BH: Tensor, token_B: Tensor) -> Tensor:
    """The block's output (B, H), each expert weighted, by 0 where it was not chosen."""
    experts = mlp.experts.served()
    routes = route(mlp.gate, x_BH, token_B, is_hash=mlp.is_hash)
    weight_BE = torch.zeros_like(routes.score_TE)
    weight_BE = weight_BE.scatter(1, routes.expert_Tk, routes.weight_Tk).to(x_BH.dtype)
    gate_up = F.linear(x_BH, experts.gate_up_proj.flatten(0, 1))
    gate, up = gate_up.unflatten(1, (len(experts.gate_up_proj), -1)).chunk(2, dim=-1)
    limit = experts.limit
    gated_BEI = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    weighted_BX = (gated_BEI * weight_BE.unsqueeze(-1)).flatten(1)
    return weighted_BX @ experts.down_proj.mT.flatten(0, 1) + mlp.shared_experts(x_BH)
