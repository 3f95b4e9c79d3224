"""Manifold-constrained hyper-connections, mHC (V4 report 2.2): N mixed residual streams.

    raw = fn @ x / rms(x);  pre, post, comb = sigmoid + eps, 2 sigmoid, Sinkhorn(softmax + eps)
    collapsed = sum_n pre[n] x[n];  new[k] = post[k] y + sum_j comb[j, k] x[j]

comb acts **transposed**. Coefficients are kept with the token last, (N, N, T): the Sinkhorn
sweeps then run over long contiguous rows, several times faster than over T small matrices. Each
equation is one autograd function: at short rows the graph's bookkeeping costs more than the sums.
This is what runs in other types than float32; else host/connect.py does on a CPU and
kernels/hyper.py on a GPU.

Legend: T tokens, N streams, H hidden size, C = 2 N + N N coefficients, X = N H; comb axes (from
stream j, to stream k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import maybe_autocast

from posttrain.backbone import again
from posttrain.backbone.function import plain_backward
from posttrain.backbone.host import use_host_loops
from posttrain.backbone.kernels import use_kernels


def wide(x: Tensor) -> Tensor:
    """bf16 as fp32; fp64 stays, so gradcheck runs this very code."""
    return x.float() if x.dtype.itemsize < 4 else x


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


class Connect(torch.autograd.Function):
    """Of streams x (T, N, H): what is kept of them, sum_j comb[j, k] x[j], (N, T, H), post (N, T)
    and collapsed (T, H)."""

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        num, x_wide = x_TNH.shape[1], wide(x_TNH)
        raw_CT, scale_T = project(x_wide.transpose(0, 1), fn_CX, norm_eps)
        found = gate_GT, _, comb_NNT, *_ = coefficients(
            raw_CT, base_C, gain_C, num, iterations, eps
        )
        collapsed_TH = weighted_sum(gate_GT[:num] + eps, x_wide)
        # 200 floats a token
        saved = found if len(x_TNH) <= again.KEPT else ()
        ctx.save_for_backward(x_TNH, fn_CX, base_C, gain_C, raw_CT, scale_T, *saved)
        ctx.iterations, ctx.eps = iterations, eps
        kept_NTH = mixed(comb_NNT.to(x_TNH.dtype), x_TNH)
        return kept_NTH, 2 * gate_GT[num:], collapsed_TH.to(x_TNH.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TNH, fn_CX, base_C, gain_C, raw_CT, scale_T, *saved = ctx.saved_tensors
        num, x_wide = x_TNH.shape[1], wide(x_TNH)
        gate_GT, soft_NNT, comb_NNT, *totals = saved or coefficients(
            raw_CT, base_C, gain_C, num, ctx.iterations, ctx.eps
        )
        grad_kept_TNH, grad_post_NT, grad_TH = wide(grads[0]).transpose(0, 1), grads[1], grads[2]
        grad_CT, grad_TH = torch.empty_like(raw_CT), wide(grad_TH)
        grad_CT[:num] = dots(x_wide, grad_TH)
        torch.mul(grad_post_NT, 2, out=grad_CT[num : 2 * num])
        grad_CT[: 2 * num].mul_(torch.addcmul(gate_GT, gate_GT, gate_GT, value=-1))
        grad_comb_NNT = torch.bmm(distinct(x_wide), grad_kept_TNH.mT).permute(1, 2, 0)
        grad_comb_NNT = grad_comb_NNT.expand_as(comb_NNT)
        grad_soft = sinkhorn_backward(grad_comb_NNT, comb_NNT, totals).mul_(soft_NNT)
        grad_soft.addcmul_(soft_NNT, grad_soft.sum(1, keepdim=True), value=-1)
        grad_CT[2 * num :] = grad_soft.flatten(0, 1)
        grad_base_C, grad_gain_C = grad_CT.sum(1), (grad_CT * raw_CT).sum(1)
        grad_CT.mul_(gain_C.unsqueeze(1))
        grad_NTH = mixed(comb_NNT.transpose(0, 1), grad_kept_TNH)
        grad_NTH.addcmul_((gate_GT[:num] + ctx.eps).unsqueeze(-1), grad_TH)
        x_NTH = x_wide.transpose(0, 1)
        grad_fn_CX = project_backward(grad_CT, x_NTH, fn_CX, raw_CT, scale_T, grad_NTH)
        grad_x_TNH = grad_NTH.transpose(0, 1).to(x_TNH.dtype)
        return grad_x_TNH, grad_fn_CX, grad_base_C, grad_gain_C, None, None, None


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


def project_backward(
    grad_CT: Tensor,
    x_NTH: Tensor,
    fn_CX: Tensor,
    raw_CT: Tensor,
    scale_T: Tensor,
    grad_NTH: Tensor,
) -> Tensor:
    """fn's gradient; x's is added to `grad_NTH`. `grad_CT` is spent."""
    size = x_NTH.shape[2]
    through_norm_T = (grad_CT * raw_CT).sum(0).mul_(scale_T.square() / -fn_CX.shape[1])
    grad_CT.mul_(scale_T)
    grad_fn_CX = torch.empty_like(fn_CX)
    for n, grad_x_TH in enumerate(grad_NTH.unbind(0)):
        part = slice(n * size, (n + 1) * size)
        grad_x_TH.addmm_(grad_CT.T, fn_CX[:, part])
        grad_x_TH.addcmul_(x_NTH[n], through_norm_T.unsqueeze(1))
        grad_fn_CX[:, part] = grad_CT @ x_NTH[n]
    return grad_fn_CX


def mixed(weight_NNT: Tensor, x_TNH: Tensor) -> Tensor:
    """sum_j weight[j, k] x[:, j], (N, T, H), stream by stream in memory: a pass over one of them
    reads whole pages and fits the second-level cache, which passes over rows of N do not."""
    out_NTH = torch.empty_like(x_TNH.transpose(0, 1), memory_format=torch.contiguous_format)
    torch.mul(weight_NNT[0].unsqueeze(-1), x_TNH[:, 0], out=out_NTH)
    for j in range(1, len(weight_NNT)):
        out_NTH.addcmul_(weight_NNT[j].unsqueeze(-1), x_TNH[:, j])
    return out_NTH


class Write(torch.autograd.Function):
    """kept[k] + post[k] y, (N, T, H), in the memory of `kept`."""

    @staticmethod
    def forward(ctx: Any, kept_NTH: Tensor, y_TH: Tensor, post_NT: Tensor) -> Tensor:
        ctx.mark_dirty(kept_NTH)
        ctx.save_for_backward(y_TH, post_NT)
        return kept_NTH.addcmul_(post_NT.unsqueeze(-1), y_TH)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_TH, post_NT = ctx.saved_tensors
        grad_TNH = grads[0].transpose(0, 1)
        return grads[0], weighted_sum(post_NT, grad_TNH), dots(grad_TNH, y_TH)


def weighted_sum(weight_NT: Tensor, x_TNH: Tensor) -> Tensor:
    """sum_n weight[n] x[:, n], (T, H)."""
    out_TH = x_TNH[:, 0] * weight_NT[0, :, None]
    for n in range(1, len(weight_NT)):
        out_TH.addcmul_(x_TNH[:, n], weight_NT[n, :, None])
    return out_TH


def dots(x_TNH: Tensor, y_TH: Tensor) -> Tensor:
    """x[:, n] . y, (N, T), laid out by token."""
    return torch.bmm(y_TH.unsqueeze(1), distinct(x_TNH).mT).squeeze(1).T.expand(x_TNH.shape[1], -1)


def distinct(x_TNH: Tensor) -> Tensor:
    """One of the streams where they share their memory, as the first layer's do: products of such
    tensors go token by token."""
    return x_TNH[:, :1] if x_TNH.stride(1) == 0 else x_TNH


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
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TNH, fn_NX, gain_1, raw_NT, scale_T, gate_NT = ctx.saved_tensors
        grad_TH, x_wide = wide(grads[0]), wide(x_TNH)
        grad_NT = dots(x_wide, grad_TH).contiguous()
        grad_NT.mul_(torch.addcmul(gate_NT, gate_NT, gate_NT, value=-1))
        grad_base_N, grad_gain_1 = grad_NT.sum(1), (grad_NT * raw_NT).sum().view(1)
        grad_NT.mul_(gain_1)
        grad_NTH, x_NTH = (gate_NT + ctx.eps).unsqueeze(-1) * grad_TH, x_wide.transpose(0, 1)
        grad_fn_NX = project_backward(grad_NT, x_NTH, fn_NX, raw_NT, scale_T, grad_NTH)
        grad_x_TNH = grad_NTH.transpose(0, 1).to(x_TNH.dtype)
        return grad_x_TNH, grad_fn_NX, grad_base_N, grad_gain_1, None, None


Writer = Callable[[Tensor], Tensor]
"""Takes a block's output y (T, H), once, and gives the streams after it, (T, N, H)."""


def connect(
    x_TNH: Tensor,
    fn_CX: Tensor,
    base_C: Tensor,
    gain_C: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Writer]:
    """What a block reads of the streams (T, H), and how its output is written to them."""
    parts: Any = Connect.apply(x_TNH, fn_CX, base_C, gain_C, norm_eps, eps, iterations)
    kept_NTH, post_NT, collapsed_TH = parts

    def write(y_TH: Tensor) -> Tensor:
        y_TH, post = y_TH.to(kept_NTH.dtype), post_NT.to(kept_NTH.dtype)
        if not torch.is_grad_enabled():
            return kept_NTH.addcmul_(post.unsqueeze(-1), y_TH).transpose(0, 1)
        streams: Any = Write.apply(kept_NTH, y_TH, post)
        return streams.transpose(0, 1)

    return collapsed_TH, write


class V4HyperConnection(stock.DeepseekV4HyperConnection):
    """Stock's parameters, over flat tokens."""

    def forward(self, x_TNH: Tensor) -> tuple[Tensor, Writer]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Streams x (T, N, H) -> what the block reads (T, H) in x's dtype, and how its output is
        written."""
        num, via = self.hc_mult, connect
        scale_3 = wide(self.scale)
        gain_C = torch.cat([scale_3[i].expand(n) for i, n in enumerate((num, num, num * num))])
        with maybe_autocast(device_type=x_TNH.device.type, enabled=False):
            if use_kernels(x_TNH):
                from posttrain.backbone.kernels import hyper  # imports triton

                via = hyper.connect
            elif use_host_loops(x_TNH):
                from posttrain.backbone.host import connect as host  # imports numba

                via = host.connect
            return via(
                x_TNH,
                wide(self.fn),
                wide(self.base),
                gain_C,
                self.input_norm.eps,
                self.hc_eps,
                self.hc_sinkhorn_iters,
            )


class V4HyperHead(stock.DeepseekV4HyperHead):
    """Stock's parameters; the streams after the last layer as one."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Streams (..., N, H) -> (..., H)."""
        head = Head.apply
        with maybe_autocast(device_type=x.device.type, enabled=False):
            if use_kernels(x):
                from posttrain.backbone.kernels import hyper  # imports triton

                head = hyper.Head.apply
            elif use_host_loops(x):
                from posttrain.backbone.host import connect as host  # imports numba

                head = host.Head.apply
            flat_TH: Any = head(
                x.flatten(0, -3),
                wide(self.hc_fn),
                wide(self.hc_base),
                wide(self.hc_scale),
                self.input_norm.eps,
                self.eps,
            )
        return flat_TH.view(*x.shape[:-2], x.shape[-1])
