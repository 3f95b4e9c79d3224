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
from posttrain.backbone.host.numbers import F32, I64, Bool

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
    """The memory of `x` as a numpy array."""
    return x.detach().numpy()


def connection(module: Any, norm: Any) -> Connection:
    arrays = (array(x) for x in (module.fn, module.base, module.scale, norm.weight))
    eps = module.input_norm.eps, module.hc_eps
    return Connection(*arrays, *eps, module.hc_sinkhorn_iters, norm.variance_epsilon)


def head(module: Any, norm: Any) -> Connection:
    arrays = (array(x) for x in (module.hc_fn, module.hc_base, module.hc_scale, norm.weight))
    return Connection(*arrays, module.input_norm.eps, module.eps, 0, norm.variance_epsilon)


def attention(module: Any) -> Attention:
    modules = (module.q_a_proj, module.q_a_norm, module.q_b_proj, module.kv_proj, module.kv_norm)
    index: tuple[F32, F32, float, int] = NONE_F2, NONE_F2, 0.0, 0
    if (indexer := getattr(module.compressor, "indexer", None)) is not None:
        scorer = indexer.scorer
        weights = array(indexer.q_b_proj.weight), array(scorer.weights_proj.weight)
        scale = scorer.weights_scaling * scorer.softmax_scale
        index = *weights, scale, indexer.index_topk
    return Attention(
        *(array(x.weight) for x in modules),
        array(module.sinks),
        array(module.o_a_proj.weight),
        array(module.o_b_proj.weight),
        *index,
        module.q_a_norm.variance_epsilon,
        module.scaling,
        module.config.sliding_window,
        module.config.o_groups,
    )


def compressor(module: Any) -> Compressor:
    rate, size = len(module.position_bias), module.kv_norm.weight.numel()
    modules = module.kv_proj.weight, module.gate_proj.weight, module.position_bias
    return Compressor(
        *(array(x) for x in (*modules, module.kv_norm.weight)),
        module.kv_norm.variance_epsilon,
        rate,
        rate * module.position_bias.shape[1] // size,
    )


def store(own: CompressedStore) -> Store:
    return Store(*(array(x) for x in (own.kv_BRX, own.gate_BRX, own.entry_BEC)))


def experts(block: Any) -> Experts:
    gate, routed, shared = block.gate, block.experts, block.shared_experts
    num_experts = len(gate.weight)
    bias_E = np.zeros(num_experts, np.float32)
    if not block.is_hash:
        bias_E = array(gate.e_score_correction_bias)
    shared_modules = shared.gate_proj, shared.up_proj, shared.down_proj
    return Experts(
        array(gate.weight),
        bias_E,
        array(routed.gate_up_proj),
        array(routed.down_proj),
        *(array(x.weight) for x in shared_modules),
        gate.routed_scaling_factor,
        routed.limit,
        shared.limit,
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
    return array(torch.view_as_real(rotation_Tr))
