"""MXFP4 codecs and fake quantisation on the GPU, bit for bit those of `posttrain.backbone.fp4`.

A group of 32 numbers along the last axis shares a scale 2^ceil(log2(amax / 6)), kept as the byte
127 + exponent (E8M0); each is divided by it and rounded to e2m1, ties to even. Two codes a byte,
the even index in the low nibble. The torch functions of the same names are the reference, and hand
over to these on a GPU.

Run so far: triton 3.6's interpreter on CPU. Compiled for sm_80 and sm_90, without spills; run on
no GPU yet.

Legend: O output rows, I input columns of a weight; leading axes such as experts are free.
"""

# triton gives a kernel's parameters their types, launch by launch
# pyright: reportMissingParameterType=false

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see kernels/__init__.py
from torch import Tensor

from posttrain.backbone.kernels.launch import ceil_div, jit

GROUP = 32
BLOCK_G = 64
"""Groups a program."""


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., O, I / 2) int8, two a byte, and scales (..., O, I / 32) E8M0.

    Args:
        weight: (..., O, I), I a multiple of 32; fp32, or what is exact in it.
    """
    weight = weight.detach().contiguous()
    *rows, width = weight.shape
    _check_multiple(width)
    codes = torch.empty(*rows, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(*rows, width // GROUP, dtype=torch.uint8, device=weight.device)
    groups = scale.numel()
    with torch.cuda.device_of(weight):
        _quantize[(ceil_div(groups, BLOCK_G),)](weight, codes, scale, groups, BLOCK_G=BLOCK_G)
    return codes.view(torch.int8), scale.view(torch.float8_e8m0fnu)


def dequantize_mxfp4(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., O, I) of packed codes (..., O, I / 2) and E8M0 scales (..., O, I / 32): exact in bf16
    and wider."""
    codes, scale = codes.contiguous().view(torch.uint8), scale.contiguous().view(torch.uint8)
    *rows, half = codes.shape
    _check_multiple(2 * half)
    out = torch.empty(*rows, 2 * half, dtype=dtype, device=codes.device)
    groups = scale.numel()
    with torch.cuda.device_of(codes):
        _dequantize[(ceil_div(groups, BLOCK_G),)](codes, scale, out, groups, BLOCK_G=BLOCK_G)
    return out


def fake_mxfp4(weight: Tensor) -> Tensor:
    """Each number as MXFP4 would give it back, in `weight`'s shape and dtype, with the straight-
    through gradient. A last axis that is no multiple of 32 ends in a shorter group."""
    return FakeMxfp4.apply(weight)  # pyright: ignore[reportReturnType]  # apply has no types


class FakeMxfp4(torch.autograd.Function):
    """`fake_mxfp4` for autograd."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        weight = weight.contiguous()
        out, width = torch.empty_like(weight), weight.shape[-1]
        groups = weight.shape[:-1].numel() * ceil_div(width, GROUP)
        grid = (ceil_div(groups, BLOCK_G),)
        with torch.cuda.device_of(weight):
            _fake[grid](weight, out, groups, width, BLOCK_G=BLOCK_G)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _check_multiple(width: int) -> None:
    if width % GROUP:
        raise ValueError(f"a length of {width} does not divide into blocks of {GROUP}")


@jit
def _scale_byte(x):
    """E8M0 bytes (G,) int32 of groups x (G, 32), read off the bits of amax / 6."""
    amax = tl.max(tl.abs(x), 1)
    bits = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)).to(tl.int32, bitcast=True)
    byte = (bits >> 23) + ((bits & 0x007FFFFF) != 0).to(tl.int32)
    byte = tl.where(bits <= 0x00400000, 0, tl.minimum(byte, 255))
    has_nan = tl.max((x != x).to(tl.int32), 1)  # a maximum leaves NaN out
    return tl.where(has_nan != 0, 255, byte)


@jit
def _power(byte):
    """2^(byte - 127) float32 of E8M0 bytes; 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@jit
def _magnitude_code(x, byte):
    """e2m1's three bits (G, 32) int32 of |x| / 2^(byte - 127): how many midpoints lie below, a
    midpoint itself going to the even code."""
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    a = tl.abs(x) * inverse[:, None]
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    return code + (a > 5.0).to(tl.int32)


@jit
def _magnitude(code):
    """The number of e2m1's three bits: 0 0.5 1 1.5 2 3 4 6."""
    mantissa = (code & 1).to(tl.float32)
    octave = (((code >> 1) + 126) << 23).to(tl.float32, bitcast=True)  # 2^(exponent - 1)
    return tl.where(code < 2, mantissa * 0.5, octave * (1.0 + mantissa * 0.5))


@jit
def _with_sign(value, sign):
    """A number >= 0 with the lowest bit of `sign`: -x would be 0 - x, which has no -0."""
    return (value.to(tl.int32, bitcast=True) | (sign << 31)).to(tl.float32, bitcast=True)


@jit
def _quantize(weight, codes, scale, groups, BLOCK_G: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    real = (group < groups)[:, None]
    place = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
    byte = _scale_byte(x)
    tl.store(scale + group, byte.to(tl.uint8), mask=group < groups)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    code = _magnitude_code(x, byte) | sign
    low, high = tl.split(tl.reshape(code, (BLOCK_G, 16, 2)))
    place = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(codes + place, (low | (high << 4)).to(tl.uint8), mask=real)


@jit
def _dequantize(codes, scale, out, groups, BLOCK_G: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    real = (group < groups)[:, None]
    place = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    pair = tl.load(codes + place, mask=real, other=0).to(tl.int32)
    code = tl.reshape(tl.join(pair & 15, pair >> 4), (BLOCK_G, 32))
    byte = tl.load(scale + group, mask=group < groups, other=127).to(tl.int32)
    value = _magnitude(code & 7) * _power(byte)[:, None]
    value = _with_sign(value, code >> 3)
    place = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=real)


@jit
def _fake(weight, out, groups, width, BLOCK_G: tl.constexpr):
    """`groups` counts those of all rows, the last of each row perhaps shorter."""
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    groups_a_row = (width + 31) // 32
    column = (group % groups_a_row)[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = (group // groups_a_row)[:, None] * width + column
    real = (group < groups)[:, None] & (column < width)
    x = tl.load(weight + place, mask=real, other=0.0).to(tl.float32)
    byte = _scale_byte(x)
    value = _magnitude(_magnitude_code(x, byte)) * _power(byte)[:, None]
    value = _with_sign(value, x.to(tl.int32, bitcast=True) >> 31)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=real)
