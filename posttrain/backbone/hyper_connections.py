"""Manifold-constrained hyper-connections, mHC (V4 report 2.2): N mixed residual streams.

    raw = fn @ x / rms(x);  pre, post, comb = sigmoid + eps, 2 sigmoid, Sinkhorn(softmax + eps)
    collapsed = sum_n pre[n] x[n];  new[k] = post[k] y + sum_j comb[j, k] x[j]

comb acts **transposed**. Coefficients are kept with the token last, (N, N, T): the Sinkhorn
sweeps then run over long contiguous rows, several times faster than over T small matrices. Each
equation is one autograd function: at short rows the graph's bookkeeping costs more than the sums.

Legend: T tokens, N streams, H hidden size, C = 2 N + N N coefficients, X = N H; comb axes (from
stream j, to stream k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import maybe_autocast

from posttrain.backbone.kernels import use_kernels

KEPT = 4096
"""Up to so many tokens coefficients and divisors are kept from forward to backward: 200 floats a
token, otherwise formed again."""


def wide(x: Tensor) -> Tensor:
    """bf16 as fp32; fp64 stays, so gradcheck runs this very code."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinkhorn_(comb_NNT: Tensor, iterations: int, eps: float) -> list[Tensor]:
    """Columns, then (rows, columns) `iterations - 1` times, each divided by its sum + eps, in
    place; the divisors, (1, N, T) and (N, 1, T) in turn."""
    totals: list[Tensor] = []
    for sweep in range(2 * iterations - 1):
        totals.append(comb_NNT.sum(sweep % 2, keepdim=True).add_(eps))
        comb_NNT.div_(totals[-1])
    return totals


def sinkhorn_backward(grad_NNT: Tensor, comb_NNT: Tensor, totals: Sequence[Tensor]) -> Tensor:
    """The gradient at Sinkhorn's input from that at its result, `comb`.

    In logarithms a sweep's gradient is g - out * sum(g), and its input is out * total: the sweeps
    are undone one by one, so that only their divisors are kept (a third of the matrices)."""
    comb_NNT = comb_NNT.clone()
    grad_log_NNT = torch.mul(grad_NNT, comb_NNT, out=torch.empty_like(comb_NNT))
    for sweep in reversed(range(len(totals))):
        sums = grad_log_NNT.sum(sweep % 2, keepdim=True)
        grad_log_NNT.addcmul_(comb_NNT, sums, value=-1)
        comb_NNT.mul_(totals[sweep])
    return grad_log_NNT.div_(comb_NNT)


class Sinkhorn(torch.autograd.Function):
    """Sinkhorn alone: what a fused kernel is held to."""

    @staticmethod
    def forward(ctx: Any, comb_NNT: Tensor, iterations: int, eps: float) -> Tensor:
        out_NNT = comb_NNT.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(out_NNT, *sinkhorn_(out_NNT, iterations, eps))
        return out_NNT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out_NNT, *totals = ctx.saved_tensors
        return sinkhorn_backward(grads[0], out_NNT, totals), None, None


class Collapse(torch.autograd.Function):
    """sum_n pre[n] x[:, n], (T, H), alone: what a fused kernel is held to."""

    @staticmethod
    def forward(ctx: Any, pre_NT: Tensor, x_TNH: Tensor) -> Tensor:
        ctx.save_for_backward(pre_NT, x_TNH)
        return weighted_sum(pre_NT, x_TNH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_NT, x_TNH = ctx.saved_tensors
        grad_pre_NT = dots(x_TNH, grads[0], out_NT=torch.empty_like(pre_NT))
        return grad_pre_NT, pre_NT.T.unsqueeze(-1) * grads[0].unsqueeze(1)


class Connect(torch.autograd.Function):
    """post (N, T), comb (N, N, T) and collapsed (T, H) of streams x (T, N, H), and x again: for
    `mix`, so that the gradient from there is added to in the same pass over the streams."""

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
        num = x_TNH.shape[1]
        raw_CT, scale_T = project(wide(x_TNH).transpose(0, 1), fn_CX, norm_eps)
        found = gate_GT, _, comb_NNT, *_ = coefficients(
            raw_CT, base_C, gain_C, num, iterations, eps
        )
        collapsed_TH = weighted_sum(gate_GT[:num] + eps, wide(x_TNH))
        kept = found if len(x_TNH) <= KEPT else ()
        ctx.save_for_backward(x_TNH, fn_CX, base_C, gain_C, raw_CT, scale_T, *kept)
        ctx.iterations, ctx.eps = iterations, eps
        return 2 * gate_GT[num:], comb_NNT, collapsed_TH.to(x_TNH.dtype), x_TNH.view_as(x_TNH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TNH, fn_CX, base_C, gain_C, raw_CT, scale_T, *kept = ctx.saved_tensors
        num, x_wide = x_TNH.shape[1], wide(x_TNH)
        gate_GT, soft_NNT, comb_NNT, *totals = kept or coefficients(
            raw_CT, base_C, gain_C, num, ctx.iterations, ctx.eps
        )
        grad_post_NT, grad_comb_NNT, grad_TH = grads[0], grads[1], wide(grads[2])
        grad_CT = torch.empty_like(raw_CT)
        dots(x_wide, grad_TH, out_NT=grad_CT[:num])
        torch.mul(grad_post_NT, 2, out=grad_CT[num : 2 * num])
        grad_CT[: 2 * num].mul_(torch.addcmul(gate_GT, gate_GT, gate_GT, value=-1))
        grad_soft = sinkhorn_backward(grad_comb_NNT, comb_NNT, totals).mul_(soft_NNT)
        grad_soft.addcmul_(soft_NNT, grad_soft.sum(1, keepdim=True), value=-1)
        grad_CT[2 * num :] = grad_soft.flatten(0, 1)
        grad_base_C, grad_gain_C = grad_CT.sum(1), (grad_CT * raw_CT).sum(1)
        grad_CT.mul_(gain_C.unsqueeze(1))
        pre_NT, x_NTH = gate_GT[:num] + ctx.eps, x_wide.transpose(0, 1)
        grad_x, grad_fn = streams_backward(
            grad_CT, grad_TH, x_NTH, fn_CX, pre_NT, raw_CT, scale_T, wide(grads[3])
        )
        return (
            grad_x.transpose(0, 1).to(x_TNH.dtype),
            grad_fn,
            grad_base_C,
            grad_gain_C,
            None,
            None,
            None,
        )


def coefficients(
    raw_CT: Tensor, base_C: Tensor, gain_C: Tensor, num: int, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """The sigmoids of pre and post (2 N, T), the softmax before Sinkhorn (N, N, T), comb after it,
    and Sinkhorn's divisors."""
    logit_CT = torch.addcmul(base_C.unsqueeze(1), raw_CT, gain_C.unsqueeze(1))
    soft_NNT = logit_CT[2 * num :].view(num, num, raw_CT.shape[1]).softmax(dim=1)
    comb_NNT = soft_NNT + eps
    totals = sinkhorn_(comb_NNT, iterations, eps)
    return logit_CT[: 2 * num].sigmoid(), soft_NNT, comb_NNT, *totals


def project(x_NTH: Tensor, fn_CX: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """fn @ x / rms(x), (C, T), and 1 / rms (T,): the norm is a scalar a token, so it divides the
    small product and the large normalised copy is never made."""
    size = x_NTH.shape[2]
    raw_CT = fn_CX[:, :size] @ x_NTH[0].T
    square_T = torch.linalg.vector_norm(x_NTH[0], dim=-1).square_()
    for n in range(1, len(x_NTH)):
        raw_CT.addmm_(fn_CX[:, n * size : (n + 1) * size], x_NTH[n].T)
        square_T.add_(torch.linalg.vector_norm(x_NTH[n], dim=-1).square_())
    scale_T = torch.rsqrt(square_T / fn_CX.shape[1] + eps)
    return raw_CT.mul_(scale_T), scale_T


def streams_backward(
    grad_CT: Tensor,
    grad_TH: Tensor,
    x_NTH: Tensor,
    fn_CX: Tensor,
    pre_NT: Tensor,
    raw_CT: Tensor,
    scale_T: Tensor,
    passed_TNH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and fn, through `raw`, the weighted sum and what x got elsewhere, if
    anything; `grad_CT` is spent."""
    size = x_NTH.shape[2]
    through_norm_T = (grad_CT * raw_CT).sum(0).mul_(scale_T.square() / -fn_CX.shape[1])
    grad_CT.mul_(scale_T)
    grad_NTH, grad_fn_CX = like_streams(x_NTH), torch.empty_like(fn_CX)
    for n, grad_x_TH in enumerate(grad_NTH.unbind(0)):
        part = slice(n * size, (n + 1) * size)
        if passed_TNH is None:
            torch.mm(grad_CT.T, fn_CX[:, part], out=grad_x_TH)
        else:
            torch.addmm(passed_TNH[:, n], grad_CT.T, fn_CX[:, part], out=grad_x_TH)
        grad_x_TH.addcmul_(x_NTH[n], through_norm_T.unsqueeze(1))
        grad_x_TH.addcmul_(pre_NT[n].unsqueeze(1), grad_TH)
        grad_fn_CX[:, part] = grad_CT @ x_NTH[n]
    return grad_NTH, grad_fn_CX


def like_streams(x_NTH: Tensor) -> Tensor:
    """Uninitialised streams (N, T, H), stream by stream in memory: a pass over one of them then
    reads whole pages and fits the second-level cache, which the passes over rows of N do not."""
    return torch.empty_like(x_NTH, memory_format=torch.contiguous_format)


class Mix(torch.autograd.Function):
    """new[k] = post[k] y + sum_j comb[j, k] x[j], (T, N, H)."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, y_TH: Tensor, post_NT: Tensor, comb_NNT: Tensor) -> Tensor:
        ctx.save_for_backward(x_TNH, y_TH, post_NT, comb_NNT)
        out_NTH = like_streams(x_TNH.transpose(0, 1))
        torch.mul(post_NT.unsqueeze(-1), y_TH, out=out_NTH)
        for j in range(len(comb_NNT)):
            out_NTH.addcmul_(comb_NNT[j].unsqueeze(-1), x_TNH[:, j])
        return out_NTH.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TNH, y_TH, post_NT, comb_NNT = ctx.saved_tensors
        (grad_TNH,) = grads
        grad_x_NTH = like_streams(x_TNH.transpose(0, 1))
        torch.mul(comb_NNT[:, 0].unsqueeze(-1), grad_TNH[:, 0], out=grad_x_NTH)
        for k in range(1, len(comb_NNT)):
            grad_x_NTH.addcmul_(comb_NNT[:, k].unsqueeze(-1), grad_TNH[:, k])
        grad_post_NT = dots(grad_TNH, y_TH, out_NT=torch.empty_like(post_NT))
        # the first layer's streams are one; products of a tensor with itself go row by row
        streams = x_TNH[:, :1] if x_TNH.stride(1) == 0 else x_TNH
        grad_comb_NNT = torch.bmm(streams, grad_TNH.mT).permute(1, 2, 0).expand_as(comb_NNT)
        grad_y_TH = weighted_sum(post_NT, grad_TNH)
        return grad_x_NTH.transpose(0, 1), grad_y_TH, grad_post_NT, grad_comb_NNT


def weighted_sum(weight_NT: Tensor, x_TNH: Tensor) -> Tensor:
    """sum_n weight[n] x[:, n], (T, H)."""
    out_TH = x_TNH[:, 0] * weight_NT[0, :, None]
    for n in range(1, len(weight_NT)):
        out_TH.addcmul_(x_TNH[:, n], weight_NT[n, :, None])
    return out_TH


def dots(x_TNH: Tensor, y_TH: Tensor, *, out_NT: Tensor) -> Tensor:
    """x[:, n] . y into out[n], stream by stream: the product of all of them is the size of x."""
    product_TH = torch.empty_like(y_TH)
    for n in range(len(out_NT)):
        torch.sum(torch.mul(x_TNH[:, n], y_TH, out=product_TH), -1, out=out_NT[n])
    return out_NT


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
        x_wide = wide(x_TNH)
        raw_NT, scale_T = project(x_wide.transpose(0, 1), fn_NX, norm_eps)
        gate_NT = torch.addcmul(base_N.unsqueeze(1), raw_NT, gain_1).sigmoid_()
        ctx.save_for_backward(x_TNH, fn_NX, gain_1, raw_NT, scale_T, gate_NT)
        ctx.eps = eps
        return weighted_sum(gate_NT + eps, x_wide).to(x_TNH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TNH, fn_NX, gain_1, raw_NT, scale_T, gate_NT = ctx.saved_tensors
        grad_TH, x_wide = wide(grads[0]), wide(x_TNH)
        grad_NT = dots(x_wide, grad_TH, out_NT=torch.empty_like(raw_NT))
        grad_NT.mul_(torch.addcmul(gate_NT, gate_NT, gate_NT, value=-1))
        grad_base_N, grad_gain_1 = grad_NT.sum(1), (grad_NT * raw_NT).sum().view(1)
        grad_NT.mul_(gain_1)
        pre_NT, x_NTH = gate_NT + ctx.eps, x_wide.transpose(0, 1)
        grad_x, grad_fn = streams_backward(grad_NT, grad_TH, x_NTH, fn_NX, pre_NT, raw_NT, scale_T)
        return grad_x.transpose(0, 1).to(x_TNH.dtype), grad_fn, grad_base_N, grad_gain_1, None, None


class V4HyperConnection(stock.DeepseekV4HyperConnection):
    """Stock's parameters; (post, comb, collapsed, x) of flat tokens."""

    def forward(self, x_TNH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (T, N, H) -> post (N, T) fp32, comb (N, N, T) fp32, collapsed (T, H) in x's dtype, and
        x again for `mix`."""
        num = self.hc_mult
        scale_3 = wide(self.scale)
        gain_C = torch.cat([scale_3[i].expand(n) for i, n in enumerate((num, num, num * num))])
        connect = Connect.apply
        if use_kernels(x_TNH):
            from posttrain.backbone.kernels import hyper  # imports triton

            connect = hyper.Connect.apply
        with maybe_autocast(device_type=x_TNH.device.type, enabled=False):
            return connect(
                x_TNH,
                wide(self.fn),
                wide(self.base),
                gain_C,
                self.input_norm.eps,
                self.hc_eps,
                self.hc_sinkhorn_iters,
            )  # pyright: ignore[reportReturnType]


class V4HyperHead(stock.DeepseekV4HyperHead):
    """Stock's parameters; the streams after the last layer as one."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Streams (..., N, H) -> (..., H)."""
        head = Head.apply
        if use_kernels(x):
            from posttrain.backbone.kernels import hyper  # imports triton

            head = hyper.Head.apply
        with maybe_autocast(device_type=x.device.type, enabled=False):
            flat_TH: Any = head(
                x.flatten(0, -3),
                wide(self.hc_fn),
                wide(self.hc_base),
                wide(self.hc_scale),
                self.input_norm.eps,
                self.eps,
            )
        return flat_TH.view(*x.shape[:-2], x.shape[-1])


def mix(x_TNH: Tensor, y_TH: Tensor, post_NT: Tensor, comb_NNT: Tensor) -> Tensor:
    """The streams after a block that returned y: (T, N, H)."""
    if use_kernels(x_TNH):
        from posttrain.backbone.kernels import mix as kernels  # imports triton

        return kernels.mix(x_TNH, y_TH, post_NT, comb_NNT)
    dtype = x_TNH.dtype
    return Mix.apply(x_TNH, y_TH.to(dtype), post_NT.to(dtype), comb_NNT.to(dtype))  # pyright: ignore[reportReturnType]
