"""What the loops read of a layer, a cache and a step: numpy arrays in the tensors' own memory.

Legend: T tokens, B slots, R ring, E entries or experts, H hidden size, N streams, X = N H, C
channels of an entry, S projected ones, h heads, d head size, r rotated pairs, k experts a token, I
an expert's channels, J = 2 I.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.backbone.cache import CompressedStore
from posttrain.backbone.host.sums import F32, I64, Bool

NONE_F1 = np.empty(0, np.float32)
NONE_F2 = np.empty((0, 0), np.float32)
NONE_F3 = np.empty((0, 0, 0), np.float32)
NONE_I2 = np.empty((0, 0), np.int64)


class Tokens(NamedTuple):
    """A step's tokens."""

    slot_T: I64
    position_T: I64
    is_real_T: Bool
    """The cache is to keep it."""


class Connection(NamedTuple):
    """A hyper-connection, or the head (no comb), and the norm behind it."""

    fn_CX: F32
    base_C: F32
    scale_3: F32
    weight_H: F32
    norm_eps: float
    eps: float
    iterations: int
    weight_eps: float


class Attention(NamedTuple):
    """An attention's weights; what is not there is empty."""

    q_a_RH: F32
    q_a_norm_R: F32
    q_b_XR: F32
    kv_dH: F32
    kv_norm_d: F32
    sink_h: F32
    o_a_YX: F32
    o_b_HY: F32
    index_q_XR: F32
    index_weight_hH: F32
    index_scale: float
    index_top_k: int
    """0: there is no indexer, all entries are attended to."""
    eps: float
    scaling: float
    window: int
    num_groups: int


class Compressor(NamedTuple):
    """A compressor's weights."""

    kv_SH: F32
    gate_SH: F32
    bias_mS: F32
    norm_C: F32
    eps: float
    rate: int
    """0: there is no compressor."""
    num_read: int
    """Tokens that make an entry."""


class Store(NamedTuple):
    """What a compressor has made and read."""

    kv_BRS: F32
    gate_BRS: F32
    entry_BEC: F32


class Experts(NamedTuple):
    """A router and its experts."""

    gate_EH: F32
    bias_E: F32
    gate_up_EJH: F32
    down_EHI: F32
    shared_gate_IH: F32
    shared_up_IH: F32
    shared_down_HI: F32
    scaling: float
    limit: float
    shared_limit: float


class Choices(NamedTuple):
    """What a layer's router gives of the step's tokens."""

    score_TE: F32
    expert_Tk: I64
    weight_Tk: F32


NO_COMPRESSOR = Compressor(NONE_F2, NONE_F2, NONE_F2, NONE_F1, 0.0, 0, 0)
NO_STORE = Store(NONE_F3, NONE_F3, NONE_F3)


def array(x: Tensor) -> Any:
    """The memory of a parameter as a numpy array. By DLPack: `numpy()` would keep FSDP from letting
    go of memory that it has seen."""
    return np.from_dlpack(x.detach())


def connection(module: Any, norm: Any) -> Connection:
    return Connection(
        fn_CX=array(module.fn),
        base_C=array(module.base),
        scale_3=array(module.scale),
        weight_H=array(norm.weight),
        norm_eps=module.input_norm.eps,
        eps=module.hc_eps,
        iterations=module.hc_sinkhorn_iters,
        weight_eps=norm.variance_epsilon,
    )


def head(module: Any, norm: Any) -> Connection:
    return Connection(
        fn_CX=array(module.hc_fn),
        base_C=array(module.hc_base),
        scale_3=array(module.hc_scale),
        weight_H=array(norm.weight),
        norm_eps=module.input_norm.eps,
        eps=module.eps,
        iterations=0,
        weight_eps=norm.variance_epsilon,
    )


def attention(module: Any) -> Attention:
    indexer = getattr(module.compressor, "indexer", None)
    scorer = indexer and indexer.scorer
    return Attention(
        q_a_RH=array(module.q_a_proj.weight),
        q_a_norm_R=array(module.q_a_norm.weight),
        q_b_XR=array(module.q_b_proj.weight),
        kv_dH=array(module.kv_proj.weight),
        kv_norm_d=array(module.kv_norm.weight),
        sink_h=array(module.sinks),
        o_a_YX=array(module.o_a_proj.weight),
        o_b_HY=array(module.o_b_proj.weight),
        index_q_XR=array(indexer.q_b_proj.weight) if indexer else NONE_F2,
        index_weight_hH=array(scorer.weights_proj.weight) if scorer else NONE_F2,
        index_scale=scorer.weights_scaling * scorer.softmax_scale if scorer else 0.0,
        index_top_k=indexer.index_topk if indexer else 0,
        eps=module.q_a_norm.variance_epsilon,
        scaling=module.scaling,
        window=module.config.sliding_window,
        num_groups=module.config.o_groups,
    )


def compressor(module: Any) -> Compressor:
    rate, width = module.position_bias.shape
    return Compressor(
        kv_SH=array(module.kv_proj.weight),
        gate_SH=array(module.gate_proj.weight),
        bias_mS=array(module.position_bias),
        norm_C=array(module.kv_norm.weight),
        eps=module.kv_norm.variance_epsilon,
        rate=rate,
        num_read=rate * width // module.kv_norm.weight.numel(),
    )


def store(own: CompressedStore) -> Store:
    return Store(own.kv_BRX.numpy(), own.gate_BRX.numpy(), own.entry_BEC.numpy())


def experts(block: Any) -> Experts:
    gate, routed, shared = block.gate, block.experts, block.shared_experts
    no_bias_E = np.zeros(len(gate.weight), np.float32)
    return Experts(
        gate_EH=array(gate.weight),
        bias_E=no_bias_E if block.is_hash else array(gate.e_score_correction_bias),
        gate_up_EJH=array(routed.gate_up_proj),
        down_EHI=array(routed.down_proj),
        shared_gate_IH=array(shared.gate_proj.weight),
        shared_up_IH=array(shared.up_proj.weight),
        shared_down_HI=array(shared.down_proj.weight),
        scaling=gate.routed_scaling_factor,
        limit=routed.limit,
        shared_limit=shared.limit,
    )


def choices(num_tokens: int, num_experts: int, top_k: int) -> Choices:
    """Room for a layer's."""
    return Choices(
        np.empty((num_tokens, num_experts), np.float32),
        np.empty((num_tokens, top_k), np.int64),
        np.empty((num_tokens, top_k), np.float32),
    )


def turns(rotation_Tr: Tensor) -> F32:
    """(T, r, 2), cos and sin, of complex rotations."""
    return torch.view_as_real(rotation_Tr).numpy()
