"""Hyper-connections (hyper_connections.py) of one decode step: the same equations in as few
operator calls as there are, for at one token a row the calls are what takes the time.

Nothing has a gradient. Streams lie token by token, so that each product is one call, and a sweep
of Sinkhorn is two: sums + eps are one product with a matrix of zeros and ones, whose last column
is eps and meets a row of ones. Numbers that sums and products take are tensors made once: a Python
number among the arguments takes as long as the sum.

Legend: T tokens, N streams, H hidden size, X = N H, C = 2 N + N N coefficients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from posttrain.backbone.decode_norm import constant, inverse_rms
from posttrain.backbone.hyper_connections import Writer, wide
from posttrain.backbone.kernels import use_kernels


@lru_cache(maxsize=8)
def sums(num: int, eps: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices (N N, N N + 1) that give each coefficient comb[j, k] the sum of its column (over j)
    or of its row (over k), plus eps."""
    same = torch.eye(num, dtype=dtype, device=device)
    eps_C1 = same.new_full((num * num, 1), eps)
    ones = torch.ones_like(same)
    columns, rows = torch.kron(ones, same), torch.kron(same, ones)
    return torch.cat([columns, eps_C1], dim=1), torch.cat([rows, eps_C1], dim=1)


@lru_cache(maxsize=8)
def part_C(num: int, device: torch.device) -> Tensor:
    """Which of (pre, post, comb) each coefficient belongs to."""
    counts = torch.tensor([num, num, num * num], device=device)
    return torch.arange(3, device=device).repeat_interleave(counts)


@lru_cache(maxsize=8)
def gate_lines(
    num: int, eps: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What is added to a sigmoid times what, so that it is (pre, post): (2 N,) each."""
    zeros = torch.zeros(num, dtype=dtype, device=device)
    return torch.cat([zeros + eps, zeros]), torch.cat([zeros + 1, zeros + 2])


def connect(connection: Any, x_TNH: Tensor) -> tuple[Tensor, Writer]:
    """What `connection`, a V4HyperConnection, gives of x (T, N, H)."""
    if use_kernels(x_TNH):  # one launch there for all sweeps
        return connection(x_TNH)
    num, eps, dtype = connection.hc_mult, connection.hc_eps, x_TNH.dtype
    x_TNH = x_TNH.contiguous()  # the first layer's streams are one, and products go token by token
    with maybe_autocast(device_type=x_TNH.device.type, enabled=False):
        x_wide = wide(x_TNH)
        raw_CT = project(x_wide, wide(connection.fn), connection.input_norm.eps)
        gain_C = wide(connection.scale).index_select(0, part_C(num, x_TNH.device))
        base_C1 = wide(connection.base).unsqueeze(1)
        logit_CT = torch.addcmul(base_C1, raw_CT, gain_C.unsqueeze(1))
        gate_TG = logit_CT[: 2 * num].T.contiguous().sigmoid_()
        shift_G, gain_G = gate_lines(num, eps, x_wide.dtype, x_wide.device)
        pre_TN, post_TN = torch.addcmul(shift_G, gate_TG, gain_G).split(num, dim=1)
        comb_NNT = logit_CT[2 * num :].view(num, num, -1).softmax(dim=1)
        comb_TNN = sinkhorn(comb_NNT, connection.hc_sinkhorn_iters, eps)
        collapsed_TH = torch.bmm(pre_TN.unsqueeze(1), x_wide).squeeze(1)
    if x_wide is not x_TNH:
        collapsed_TH = collapsed_TH.to(dtype)
        post_TN, comb_TNN = post_TN.to(dtype), comb_TNN.to(dtype)

    def write(y_TH: Tensor) -> Tensor:
        written_TNH = post_TN.unsqueeze(2) * y_TH.to(dtype).unsqueeze(1)
        return written_TNH.baddbmm_(comb_TNN.mT, x_TNH)

    return collapsed_TH, write


def project(x_TNH: Tensor, fn_CX: Tensor, eps: float) -> Tensor:
    """fn @ x / rms(x), (C, T)."""
    x_TX = x_TNH.flatten(1)
    scale_T1 = inverse_rms(x_TX, eps)
    return torch.mm(fn_CX, x_TX.T).mul_(scale_T1.view(-1))


def sinkhorn(soft_NNT: Tensor, iterations: int, eps: float) -> Tensor:
    """Columns, then (rows, columns) `iterations - 1` times, each divided by its sum + eps, of
    soft + eps; (T, N, N)."""
    num, _, tokens = soft_NNT.shape
    sums_CX = sums(num, eps, soft_NNT.dtype, soft_NNT.device)
    padded_XT = soft_NNT.new_ones(num * num + 1, tokens)
    comb_CT, total_CT = padded_XT[:-1], torch.empty_like(padded_XT[:-1])
    torch.add(soft_NNT.flatten(0, 1), constant(eps, soft_NNT), out=comb_CT)
    divide, comb, total = cast("tuple[Any, Any, Any]", (torch.div, comb_CT, total_CT))
    if comb_CT.device.type == "cpu":  # numpy divides so few numbers in half the time
        divide, comb, total = np.divide, comb.numpy(), total.numpy()
    with np.errstate(all="ignore"):  # a token that is no number is no error of the others'
        for sweep in range(2 * iterations - 1):
            torch.mm(sums_CX[sweep % 2], padded_XT, out=total_CT)
            divide(comb, total, out=comb)
    return comb_CT.T.contiguous().view(tokens, num, num)


def collapse(head: Any, x_TNH: Tensor) -> Tensor:
    """What `head`, a V4HyperHead, gives of the streams after the last layer, (T, H)."""
    if use_kernels(x_TNH):
        return head(x_TNH)
    with maybe_autocast(device_type=x_TNH.device.type, enabled=False):
        x_wide = wide(x_TNH)
        raw_NT = project(x_wide, wide(head.hc_fn), head.input_norm.eps)
        gate_NT = torch.addcmul(wide(head.hc_base).unsqueeze(1), raw_NT, wide(head.hc_scale))
        pre_TN = gate_NT.T.contiguous().sigmoid_().add_(constant(head.eps, x_wide))
        return torch.bmm(pre_TN.unsqueeze(1), x_wide).squeeze(1).to(x_TNH.dtype)
