"""MXFP4 and FP8 as DeepSeek-V4's checkpoints and serving kernels keep them: codecs and fake quants.

A block of numbers shares a scale 2^ceil(log2(amax / largest)), stored as the byte 127 + exponent
(E8M0); each number is divided by it and rounded to nearest, ties to even. FP4 (e2m1, largest 6) has
groups of 32 along the last axis and two codes a byte, the low nibble first; FP8 (e4m3, largest 448)
has 128 x 128 tiles for weights, 1 x 128 for activations and 1 x 64 for the KV cache (V4 report, FP4
quantisation-aware training; the scale rule is RCEIL of OCP MX tools).

Quantise from the fp32 master: through a bf16 copy near 1% of the FP4 codes come out another way.

On a GPU the MXFP4 functions run in the kernels of kernels/mxfp4.py, bit for bit the same. A group
that holds an infinity or a NaN has the scale NaN and codes of magnitude 0.

Legend: O output rows, I input columns of a weight; leading axes such as experts are free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.again import form_again
from posttrain.backbone.kernels import use_kernels

GROUP = 32
"""Numbers that share a scale in MXFP4."""
TILE = 128
"""Side of the square of a weight that shares a scale in FP8."""

FP4_LARGEST, FP8_LARGEST = 6.0, 448.0
FP8_SPARE_BITS = 6
"""6 * 2^6 = 384 <= 448: how far FP4's largest number can be shifted up inside e4m3."""
FP8_EXACT_BITS = 14
"""How far apart (log2) the group scales of one tile may be: 0.5 * 2^(6 - 14) is e4m3's 2^-9."""
ACTIVATION_FLOOR = 1e-4
"""Serving kernels take no activation block's amax for less."""

E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BITS, _MANTISSA_BITS, _HALF_OF_SMALLEST = 0x7F800000, 0x007FFFFF, 0x00400000
_CHUNK = 1 << 18
"""Numbers quantised at once by the fake quants: bounds their temporaries."""


def scale_of(amax: Tensor, largest: float) -> Tensor:
    """E8M0 of 2^ceil(log2(amax / largest)), read off the float's bits: log2 itself rounds numbers
    just above a power of two down to it. Zero gives 2^-127; inf and NaN give E8M0's NaN."""
    bits = (amax.float() / largest).view(torch.int32)
    byte = (bits >> 23) + ((bits & _MANTISSA_BITS) != 0)
    byte = torch.where(bits <= _HALF_OF_SMALLEST, 0, byte.clamp(max=255))  # subnormal: to 2^-127
    return byte.to(torch.uint8).view(E8M0)


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., O, I / 2) int8, two a byte, and scales (..., O, I / 32) E8M0.

    Args:
        weight: (..., O, I), I a multiple of 32; fp32, or what is exact in it.
    """
    _check_multiple(weight.shape[-1], GROUP)
    if use_kernels(weight):
        from posttrain.backbone.kernels import mxfp4  # imports triton

        return mxfp4.quantize_mxfp4(weight)
    grouped = weight.detach().float().unflatten(-1, (-1, GROUP))
    scale = scale_of(grouped.abs().amax(-1), FP4_LARGEST)
    scaled = grouped / scale.float().unsqueeze(-1)
    half_steps, octave = _e2m1(scaled)
    code = half_steps.add_(octave.log2_().mul_(2)).nan_to_num_(nan=0.0).to(torch.uint8)
    code |= grouped.signbit().to(torch.uint8) << 3
    return pack(code.flatten(-2)), scale


def dequantize_mxfp4(codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., O, I) of packed codes (..., O, I / 2) and E8M0 scales (..., O, I / 32): exact in bf16
    and wider (one bit of mantissa, eight of exponent)."""
    if use_kernels(codes):
        from posttrain.backbone.kernels import mxfp4  # imports triton

        return mxfp4.dequantize_mxfp4(codes, scale, dtype=dtype)
    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    # a byte's two numbers are looked up as one integer of twice the width: 5 times faster
    pairs = unpack(torch.arange(256, dtype=torch.uint8, device=codes.device)[:, None])
    table = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=codes.device)
    integer = torch.int32 if work == torch.bfloat16 else torch.int64
    table_256 = table[pairs.int()].to(work).view(integer).flatten()
    byte = codes.view(torch.uint8).int()
    value = table_256.index_select(0, byte.flatten()).view(codes.shape).view(work)
    grouped = value.unflatten(-1, (-1, GROUP)).mul_(scale.float().to(work).unsqueeze(-1))
    return grouped.flatten(-2).to(dtype)


def pack(code: Tensor) -> Tensor:
    """Codes 0-15 (..., I) uint8 to (..., I / 2) int8; the even index in the low nibble."""
    return (code[..., 0::2] | (code[..., 1::2] << 4)).view(torch.int8)


def unpack(codes: Tensor) -> Tensor:
    """(..., I / 2) int8 or uint8 to codes 0-15 (..., I) uint8."""
    byte = codes.view(torch.uint8)
    return torch.stack([byte & 15, byte >> 4], dim=-1).flatten(-2)


def _e2m1(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude rounded to e2m1 as (n, octave) with value n * octave / 2, octave in {1, 2, 4}: the
    spacing is 0.5 below 2, 1 below 4, 2 below 6, and an even n is an even code."""
    magnitude = scaled.abs().clamp_(max=FP4_LARGEST)
    octave = (magnitude.view(torch.int32) & _EXPONENT_BITS).view(torch.float32).clamp_(1, 4)
    return magnitude.div_(octave).mul_(2).round_(), octave


def quantize_fp8(weight: Tensor, *, scale_dtype: torch.dtype = E8M0) -> tuple[Tensor, Tensor]:
    """e4m3 (O, I) and a scale for each 128 x 128 tile, (ceil(O / 128), ceil(I / 128)).

    Args:
        weight: (O, I).
        scale_dtype: E8M0, a power of two; or float32, amax / 448, as in the -Base checkpoints.
    """
    rows, columns = weight.shape
    wide = weight.detach().float()
    padded = F.pad(wide, (0, -columns % TILE, 0, -rows % TILE))
    tiles = padded.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    amax = tiles.abs().amax((1, 3))
    if scale_dtype == E8M0:
        scale = scale_of(amax, FP8_LARGEST)
    else:
        scale = torch.where(amax > 0, amax / FP8_LARGEST, 1.0).to(scale_dtype)
    return _to_e4m3(wide / _spread(scale.float(), rows, columns)), scale


def dequantize_fp8(weight: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(O, I) of e4m3 (O, I) and a scale for each 128 x 128 tile: exact in bf16 where the scales are
    powers of two, else rounded twice (fp32, then `dtype`), as in the reference code."""
    return weight.float().mul_(_spread(scale.float(), *weight.shape)).to(dtype)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]


def _to_e4m3(scaled: Tensor) -> Tensor:
    return scaled.clamp(-FP8_LARGEST, FP8_LARGEST).to(E4M3)  # beyond, some casts give NaN


def fits_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Whether each 128 x 128 tile of an MXFP4 weight converts to FP8 without loss for certain:
    its largest and smallest group scale at most 2^14 apart, groups of zeros aside.

    Args:
        codes: (O, I / 2) int8. scale: (O, I / 32) E8M0. O and I multiples of 128.

    Returns:
        (O / 128, I / 128) bool.
    """
    low, high = _scale_range(codes, scale)
    return high - low <= FP8_EXACT_BITS


def mxfp4_to_fp8(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers as e4m3 (O, I) with one E8M0 scale for each 128 x 128 tile, the largest
    group scale / 2^6: what GPUs without FP4 compute with.

    Raises:
        ValueError: a tile whose group scales are too far apart for that (`fits_fp8`).
    """
    low, high = _scale_range(codes, scale)
    if bool((high - low > FP8_EXACT_BITS).any()):
        row, column = (high - low > FP8_EXACT_BITS).nonzero()[0].tolist()
        raise ValueError(
            f"tile ({row}, {column}) of the FP4 weight has group scales 2^"
            f"{int((high - low)[row, column])} apart, and FP8 with one scale a tile is exact up to "
            f"2^{FP8_EXACT_BITS}: keep it in FP4, or dequantise it to bf16"
        )
    tile_scale = (high - FP8_SPARE_BITS).clamp(0, 254).to(torch.uint8).view(E8M0)
    value = dequantize_mxfp4(codes, scale, dtype=torch.float32)
    return _to_e4m3(value / _spread(tile_scale.float(), *value.shape)), tile_scale


def _scale_range(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest scale byte of each tile's groups that hold a number, int32; a tile of
    zeros has 127 for both."""
    _check_multiple(codes.shape[0], TILE)
    _check_multiple(codes.shape[1] * 2, TILE)
    has_number = ((codes.view(torch.uint8) & 0x77) != 0).unflatten(-1, (-1, GROUP // 2)).any(-1)
    byte = scale.view(torch.uint8).int()

    def tiles(groups: Tensor) -> Tensor:
        return groups.unflatten(1, (-1, TILE // GROUP)).unflatten(0, (-1, TILE))

    low = tiles(torch.where(has_number, byte, 256)).amin((1, 3))
    high = tiles(torch.where(has_number, byte, -1)).amax((1, 3))
    is_zero = high < 0
    return low.masked_fill(is_zero, 127), high.masked_fill(is_zero, 127)


class _StraightThrough(torch.autograd.Function):
    """A rounding whose gradient passes as if there were none. As a function, since
    x + (round(x) - x).detach() is not round(x) to the last bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_mxfp4(weight: Tensor) -> Tensor:
    """Each number as MXFP4 would give it back, in `weight`'s shape and dtype, with the straight-
    through gradient. A last axis that is no multiple of 32 ends in a shorter group."""
    if use_kernels(weight):
        from posttrain.backbone.kernels import mxfp4  # imports triton

        return mxfp4.fake_mxfp4(weight)
    return _fake(weight, GROUP, _round_mxfp4)


def fake_fp8_blocks(x: Tensor, block: int = 64) -> Tensor:
    """Each number as FP8 with a power-of-two scale for each `block` along the last axis would give
    it back: V4's KV cache, on the dims without RoPE. Straight-through gradient."""
    return _fake(x, block, _round_fp8)


def fake_fp8_activation(x: Tensor) -> Tensor:
    """`fake_fp8_blocks` at 1 x 128: what serving does to the input of an FP8 or FP4 matrix."""
    return _fake(x, TILE, _round_fp8)


def fake_indexer_fp4(x: Tensor) -> Tensor:
    """The indexer's queries and keys as serving compares them: rotated by `hadamard`, then MXFP4.
    Scores are unchanged by the rotation itself, as both sides have it."""
    return fake_mxfp4(hadamard(x))


def hadamard(x: Tensor) -> Tensor:
    """x times the orthonormal Hadamard matrix along the last axis, a power of two long; its own
    inverse. By butterflies: a row's bits then do not depend on how many rows there are, which a
    GEMM's may, and FP4 would make a last bit a whole step."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"the Hadamard matrix needs a power of two, the last axis is {size} long")
    out = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < size:
        low, high = out.unflatten(-1, (-1, 2, half)).unbind(-2)
        out = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return (out * size**-0.5).to(x.dtype)


def _fake(x: Tensor, block: int, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Straight-through `rounding` of blocks (N, block) fp32, cut from the last axis."""

    def rounded(x: Tensor) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        step = max(_CHUNK // width, 1)
        for source, target in zip(rows.split(step), out.split(step), strict=True):
            wide = F.pad(source.float(), (0, -width % block))
            target.copy_(rounding(wide.reshape(-1, block)).view_as(wide)[:, :width])
        return out.view(x.shape)

    out: Any = _StraightThrough.apply(x, rounded)
    form_again(out, rounded, x)
    return out


def _round_mxfp4(block_NB: Tensor) -> Tensor:
    scale_N1 = scale_of(block_NB.abs().amax(-1, keepdim=True), FP4_LARGEST).float()
    scaled = block_NB / scale_N1
    half_steps, octave = _e2m1(scaled)
    return half_steps.mul_(octave).mul_(0.5).copysign_(scaled).mul_(scale_N1)


def _round_fp8(block_NB: Tensor) -> Tensor:
    amax_N1 = block_NB.abs().amax(-1, keepdim=True).clamp(min=ACTIVATION_FLOOR)
    scale_N1 = scale_of(amax_N1, FP8_LARGEST).float()
    return _to_e4m3(block_NB / scale_N1).float().mul_(scale_N1)


def _check_multiple(length: int, block: int) -> None:
    if length % block:
        raise ValueError(f"a length of {length} does not divide into blocks of {block}")
