"""mHC on the GPU (V4 report 2.2): hyper_connections' `connect` and `Head`, the same arguments,
results and gradients, out of the kernels here and products by cuBLAS.

    raw = fn @ x / rms(x);  pre, post, comb = sigmoid + eps, 2 sigmoid, Sinkhorn(softmax + eps)
    collapsed = sum_n pre[n] x[n]

The streams are read once by the product (a stream at a time, widened to float32 if need be), once
by the norm and once by the collapse; what is kept for backward is them and C numbers a token.

Run so far: triton 3.6's interpreter on CPU; on no GPU yet.

Legend: T tokens, N streams, H hidden size, C = 2 N + N N coefficients, X = N H; comb axes (from
stream j, to stream k, token).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone.function import plain_backward
from posttrain.backbone.kernels.mix import add_streams, collapse, dots, mix
from posttrain.backbone.kernels.sinkhorn import sinkhorn, sinkhorn_backward


def connect(
    x_TNH: Tensor,
    fn_CX: Tensor,
    base_C: Tensor,
    gain_C: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a block reads of the streams (T, H), and how its output is written to them."""
    parts: Any = Connect.apply(x_TNH, fn_CX, base_C, gain_C, norm_eps, eps, iterations)
    post_NT, comb_NNT, collapsed_TH, x_TNH = parts
    return collapsed_TH, lambda y_TH: mix(x_TNH, y_TH, post_NT, comb_NNT)


class Connect(torch.autograd.Function):
    """post (N, T), comb (N, N, T) and collapsed (T, H) of streams x (T, N, H), and x again, whose
    gradient is added to in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TNH: Tensor,
        fn_CX: Tensor,
        base_C: Tensor,
        gain_C: Tensor,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_TNH = x_TNH.contiguous()
        num = x_TNH.shape[1]
        raw_CT, scale_T = project(x_TNH, fn_CX, norm_eps)
        logit_CT = torch.addcmul(base_C.unsqueeze(1), raw_CT, gain_C.unsqueeze(1))
        gate_GT = logit_CT[: 2 * num].sigmoid()
        soft_NNT = logit_CT[2 * num :].unflatten(0, (num, num)).softmax(dim=1)
        comb_NNT = sinkhorn(soft_NNT + eps, iterations, eps)
        collapsed_TH = collapse(gate_GT[:num] + eps, x_TNH)
        ctx.save_for_backward(x_TNH, fn_CX, gain_C, raw_CT, scale_T, gate_GT, soft_NNT)
        ctx.eps, ctx.iterations = eps, iterations
        return 2 * gate_GT[num:], comb_NNT, collapsed_TH, x_TNH.view_as(x_TNH)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # plain_backward's type
        x_TNH, fn_CX, gain_C, raw_CT, scale_T, gate_GT, soft_NNT = ctx.saved_tensors
        grad_post_NT, grad_comb_NNT, grad_TH, passed_TNH = grads
        num = x_TNH.shape[1]
        grad_gate_GT = torch.cat([dots(x_TNH, grad_TH), 2 * grad_post_NT])
        grad_gate_GT *= gate_GT * (1 - gate_GT)
        inputs = (grad_comb_NNT, soft_NNT + ctx.eps, ctx.iterations, ctx.eps)
        grad_soft_NNT = sinkhorn_backward(*inputs).mul_(soft_NNT)
        grad_soft_NNT -= soft_NNT * grad_soft_NNT.sum(1, keepdim=True)
        grad_CT = torch.cat([grad_gate_GT, grad_soft_NNT.flatten(0, 1)])
        grad_base_C, grad_gain_C = grad_CT.sum(1), (grad_CT * raw_CT).sum(1)
        grad_CT *= gain_C.unsqueeze(1)
        pre_NT = gate_GT[:num] + ctx.eps
        inputs = (grad_CT, grad_TH, x_TNH, fn_CX, pre_NT, raw_CT, scale_T, passed_TNH)
        grad_x_TNH, grad_fn_CX = streams_backward(*inputs)
        return grad_x_TNH, grad_fn_CX, grad_base_C, grad_gain_C, None, None, None


class Head(torch.autograd.Function):
    """sum_n pre[n] x[:, n], (T, H), after the last layer: no post, no comb."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TNH: Tensor,
        fn_NX: Tensor,
        base_N: Tensor,
        gain_1: Tensor,
        norm_eps: float,
        eps: float,
    ) -> Tensor:
        x_TNH = x_TNH.contiguous()
        raw_NT, scale_T = project(x_TNH, fn_NX, norm_eps)
        gate_NT = torch.addcmul(base_N.unsqueeze(1), raw_NT, gain_1).sigmoid_()
        ctx.save_for_backward(x_TNH, fn_NX, gain_1, raw_NT, scale_T, gate_NT)
        ctx.eps = eps
        return collapse(gate_NT + eps, x_TNH)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # plain_backward's type
        x_TNH, fn_NX, gain_1, raw_NT, scale_T, gate_NT = ctx.saved_tensors
        grad_NT = dots(x_TNH, grads[0]).mul_(gate_NT * (1 - gate_NT))
        grad_base_N, grad_gain_1 = grad_NT.sum(1), (grad_NT * raw_NT).sum().view(1)
        grad_NT *= gain_1
        inputs = (grad_NT, grads[0], x_TNH, fn_NX, gate_NT + ctx.eps, raw_NT, scale_T)
        return *streams_backward(*inputs), grad_base_N, grad_gain_1, None, None


def project(x_TNH: Tensor, fn_CX: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """fn @ x / rms(x), (C, T), and 1 / rms (T,), both float32: the norm is a scalar a token, so it
    divides the small product and the large normalised copy is never made."""
    size = x_TNH.shape[2]
    raw_CT = fn_CX.new_zeros(len(fn_CX), len(x_TNH))
    for x_TH, fn_CH in zip(x_TNH.unbind(1), fn_CX.split(size, dim=1), strict=True):
        raw_CT.addmm_(fn_CH, x_TH.float().T)
    norm_TN = torch.linalg.vector_norm(x_TNH, dim=-1, dtype=torch.float32)
    scale_T = torch.rsqrt(norm_TN.square().sum(1) / fn_CX.shape[1] + eps)
    return raw_CT.mul_(scale_T), scale_T


def streams_backward(
    grad_CT: Tensor,
    grad_TH: Tensor,
    x_TNH: Tensor,
    fn_CX: Tensor,
    pre_NT: Tensor,
    raw_CT: Tensor,
    scale_T: Tensor,
    passed_TNH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and fn, through `raw`, the weighted sum and what x got elsewhere, if
    anything; `grad_CT` is spent."""
    through_norm_T = (grad_CT * raw_CT).sum(0) * scale_T.square() / -fn_CX.shape[1]
    grad_CT *= scale_T
    through_fn_TNH = (grad_CT.T @ fn_CX).view(x_TNH.shape)
    parts = (through_fn_TNH, x_TNH, grad_TH, through_norm_T, pre_NT, passed_TNH)
    grad_x_TNH = add_streams(*parts)
    grad_fn_CX = torch.cat([grad_CT @ x_TH.float() for x_TH in x_TNH.unbind(1)], dim=1)
    return grad_x_TNH, grad_fn_CX
