"""Hyper-connections in training (V4 report 2.2): hyper_connections' `connect` and `Head`, the same
arguments, results and gradients, in loops over each token's streams and torch's products.

    raw = fn @ x / rms(x);  pre, post, comb = sigmoid + eps, 2 sigmoid, Sinkhorn(softmax + eps)
    collapsed = sum_n pre[n] x[n];  new[k] = post[k] y + sum_j comb[j, k] x[j]

What is kept from forward to backward is x, C + 1 numbers a token, and y.

Legend: T tokens, N streams, H hidden size, C = 2 N + N N coefficients, X = N H; comb axes (token,
to stream k, from stream j).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from posttrain.backbone.again import form_again
from posttrain.backbone.function import plain_backward
from posttrain.backbone.host import streams
from posttrain.backbone.host.parts import in_parts, num_blocks


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
    if not x_TNH.is_contiguous():  # the first layer's streams are one
        x_TNH, same_TNH = x_TNH.contiguous(), x_TNH
        form_again(x_TNH, Tensor.contiguous, same_TNH)
    parts: Any = Connect.apply(x_TNH, fn_CX, base_C, gain_C, norm_eps, eps, iterations)
    new_TNH, post_TN, comb_TNN, collapsed_TH = parts
    mixture = (x_TNH.detach(), comb_TNN)

    def write(y_TH: Tensor) -> Tensor:
        y_TH = y_TH.to(x_TNH.dtype)
        if not torch.is_grad_enabled():
            return written(*mixture, y_TH, post_TN)
        out_TNH = cast("Tensor", Write.apply(new_TNH, y_TH, post_TN, mixture))
        form_again(out_TNH, written, *mixture, y_TH, post_TN)
        return out_TNH

    return collapsed_TH, write


class Connect(torch.autograd.Function):
    """post (T, N), comb (T, N, N) and collapsed (T, H) of streams x (T, N, H). Before them what
    stands for the streams after the block, whose memory `Write` alone has: their gradient comes
    back by it."""

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
    ) -> tuple[Tensor, ...]:
        tokens, num, _ = x_TNH.shape
        post_TN, comb_TNN = x_TNH.new_empty(tokens, num), x_TNH.new_empty(tokens, num, num)
        settings = norm_eps, eps, iterations
        collapsed_TH = read(ctx, x_TNH, fn_CX, base_C, gain_C, settings, post_TN, comb_TNN)
        ctx.mark_non_differentiable(comb_TNN)
        return x_TNH.new_empty(()).expand_as(x_TNH), post_TN, comb_TNN, collapsed_TH

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_new_TNH, grad_post_TN, _, grad_TH = grads
        return *read_backward(ctx, grad_TH, grad_post_TN, grad_new_TNH), None, None, None


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
        settings, nothing = (norm_eps, eps, 0), x_TNH.new_empty(0, 0)
        gain_N, nothing_3 = gain_1.expand_as(base_N), nothing.unsqueeze(0)
        x_TNH = x_TNH.contiguous()
        return read(ctx, x_TNH, fn_NX, base_N, gain_N, settings, nothing, nothing_3)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        nothing = grads[0].new_empty(0, 0)
        found = read_backward(ctx, grads[0], nothing, nothing.unsqueeze(0))
        grad_x_TNH, grad_fn_NX, grad_base_N, grad_gain_N = found
        return grad_x_TNH, grad_fn_NX, grad_base_N, grad_gain_N.sum().view(1), None, None


class Write(torch.autograd.Function):
    """post[k] y + sum_j comb[j, k] x[j], (T, N, H), of the `mixture` x and comb, whose gradients
    `Connect` forms from that of the result."""

    @staticmethod
    def forward(
        ctx: Any,
        new_TNH: Tensor,
        y_TH: Tensor,
        post_TN: Tensor,
        mixture: tuple[Tensor, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(y_TH, post_TN)
        return written(*mixture, y_TH, post_TN)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_TH, post_TN = (x.contiguous() for x in ctx.saved_tensors)
        grad_TNH = grads[0].contiguous()
        grad_y_TH, grad_post_TN = torch.empty_like(y_TH), torch.empty_like(post_TN)
        tensors = grad_TNH, y_TH, post_TN, grad_y_TH, grad_post_TN
        over_tokens(streams.write_backward, *tensors)
        return grad_TNH, grad_y_TH, grad_post_TN, None


def written(x_TNH: Tensor, comb_TNN: Tensor, y_TH: Tensor, post_TN: Tensor) -> Tensor:
    """post[k] y + sum_j comb[j, k] x[j], (T, N, H)."""
    out_TNH = torch.empty_like(x_TNH)
    over_tokens(streams.write, x_TNH, y_TH.contiguous(), post_TN, comb_TNN, out_TNH)
    return out_TNH


def read(
    ctx: Any,
    x_TNH: Tensor,
    fn_CX: Tensor,
    base_C: Tensor,
    gain_C: Tensor,
    settings: tuple[float, float, int],
    post_TN: Tensor,
    comb_TNN: Tensor,
) -> Tensor:
    """collapsed; post and comb go where they are given, if C is more than N."""
    base_C, gain_C = base_C.contiguous(), gain_C.contiguous()
    raw_CT = fn_CX @ x_TNH.flatten(1).T
    scale_T, collapsed_TH = x_TNH.new_empty(len(x_TNH)), torch.empty_like(x_TNH[:, 0])
    weights = x_TNH, raw_CT, base_C, gain_C
    over_tokens(streams.read, *weights, *settings, scale_T, collapsed_TH, post_TN, comb_TNN)
    ctx.save_for_backward(x_TNH, fn_CX, raw_CT, scale_T, base_C, gain_C)
    ctx.settings = settings
    return collapsed_TH


def read_backward(
    ctx: Any, grad_TH: Tensor, grad_post_TN: Tensor, grad_new_TNH: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of x, fn, base and gain."""
    x_TNH, fn_CX, raw_CT, scale_T, base_C, gain_C = ctx.saved_tensors
    grad_CT, grad_x_TNH = torch.empty_like(raw_CT), torch.empty_like(x_TNH)
    sum_AZC = raw_CT.new_empty(num_blocks(len(x_TNH)), 2, len(raw_CT))
    over_tokens(
        streams.read_backward,
        x_TNH,
        raw_CT,
        scale_T,
        base_C,
        gain_C,
        *ctx.settings[1:],
        grad_TH.contiguous(),
        grad_post_TN.contiguous(),
        grad_new_TNH.contiguous(),
        grad_CT,
        grad_x_TNH,
        sum_AZC,
    )
    x_TX = x_TNH.flatten(1)
    grad_x_TNH.view(x_TX.shape).addmm_(grad_CT.T, fn_CX)
    grad_fn_CX = grad_CT @ x_TX if ctx.needs_input_grad[1] else None
    return grad_x_TNH, grad_fn_CX, *sum_AZC.sum(0)


def over_tokens(loops: Any, x_TNH: Tensor, *others: Any) -> None:
    """loops(first, end, x, ..), each stream with each."""
    tokens, num, size = x_TNH.shape
    in_parts(loops, tokens, num * num * size, x_TNH, *others)
