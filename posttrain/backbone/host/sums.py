"""What the loops of a step are put together from: functions of a number, a row, two matrices.

A row's result depends, to the bit, on nothing but the row: every row goes through the same
instructions, those that fill up a block of four too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.backbone.host.loops import carray, outlined, within
from posttrain.backbone.host.vectors import WIDTH, behind, weighted_sum

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

_add_four_by_two, _add_four_by_one = weighted_sum(4, 2), weighted_sum(4, 1)
_add_one_by_two, _add_one_by_one = weighted_sum(1, 2), weighted_sum(1, 1)


@within
def copy(x_C: F32, out_C: F32) -> None:
    """Numba's `out[:] = x` compiles its errors' texts too, for seconds."""
    for c in range(x_C.size):
        out_C[c] = x_C[c]


@within
def exp(x: np.float32) -> np.float32:
    """e^x to 4e-7 of itself; x between -87 and 88, further out as there. In vectors, which the C
    library's does not go in: Cephes' polynomial of x - n ln 2, and 2^n by its bits."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@within
def sigmoid(x: np.float32) -> np.float32:
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@within
def inverse_rms(x_C: F32, eps: float) -> np.float32:
    """1 / rms(x)."""
    square = np.float32(0.0)
    for c in range(x_C.size):
        square += x_C[c] * x_C[c]
    return np.float32(1.0) / np.sqrt(square / np.float32(x_C.size) + np.float32(eps))


@within
def norm(x_C: F32, weight_C: F32, eps: float) -> None:
    """x / rms(x) * weight, in place."""
    scale = inverse_rms(x_C, eps)
    for c in range(x_C.size):
        x_C[c] = x_C[c] * scale * weight_C[c]


@within
def rotate(x_d: F32, turn_rZ: F32, sign: np.float32) -> None:
    """Turn the last channels of x in place, by cos and sin of each pair; sign -1 turns back."""
    first = x_d.size - 2 * len(turn_rZ)
    for r in range(len(turn_rZ)):
        cos, sin = turn_rZ[r, 0], turn_rZ[r, 1] * sign
        a, b = x_d[first + 2 * r], x_d[first + 2 * r + 1]
        x_d[first + 2 * r] = a * cos - b * sin
        x_d[first + 2 * r + 1] = a * sin + b * cos


@within
def product(x_TX: F32, weight_NK: F32, out_TY: F32, first: int, to: int) -> None:
    """x @ weight^T, of the K columns of x from `first` on, into the N of out from `to` on. The
    numbers of a row stand side by side in memory."""
    num, size = weight_NK.shape
    x_row, row = x_TX.strides[0] // 4, weight_NK.strides[0] // 4
    out_row = out_TY.strides[0] // 4
    x, out = x_TX[:, first:].ctypes, out_TY[:, to:].ctypes
    multiply(x, x_row, weight_NK.ctypes, row, out, out_row, len(x_TX), num, size)


@outlined(3 * "floats int " + 3 * "int ")
def multiply(
    x: Any,
    x_row: int,
    weight: Any,
    row: int,
    out: Any,
    out_row: int,
    rows: int,
    num: int,
    size: int,
) -> None:
    """`product`, of matrices whose rows are so many numbers apart. In blocks of four rows and two
    columns, whose sums stay in registers; a row past the last is the last."""
    x_TX, weight_NX = carray(x, (rows, x_row)), carray(weight, (num, row))
    out_TY, last = carray(out, (rows, out_row)), rows - 1
    for t in range(0, rows, 4):
        t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
        x0, x1, x2, x3 = x_TX[t], x_TX[t1], x_TX[t2], x_TX[t3]
        for n in range(0, num, 2):
            m = min(n + 1, num - 1)
            u_K, v_K = weight_NX[n], weight_NX[m]
            a = b = c = d = e = f = g = h = np.float32(0.0)
            for i in range(size):
                u, v = u_K[i], v_K[i]
                a += x0[i] * u
                b += x1[i] * u
                c += x2[i] * u
                d += x3[i] * u
                e += x0[i] * v
                f += x1[i] * v
                g += x2[i] * v
                h += x3[i] * v
            out_TY[t, n], out_TY[t, m] = a, e
            out_TY[t1, n], out_TY[t1, m] = b, f
            out_TY[t2, n], out_TY[t2, m] = c, g
            out_TY[t3, n], out_TY[t3, m] = d, h


@within
def add_weighted(weight_hX: F32, x_Kd: F32, out_hd: F32, first: int) -> None:
    """out[h] += sum_k weight[h, first + k] x[k]. The numbers of a row stand side by side."""
    num, size = x_Kd.shape
    weight, weight_row = weight_hX[:, first:].ctypes, weight_hX.strides[0] // 4
    x_row, out_row = x_Kd.strides[0] // 4, out_hd.strides[0] // 4
    accumulate(
        weight, weight_row, x_Kd.ctypes, x_row, out_hd.ctypes, out_row, len(out_hd), num, size
    )


@outlined(3 * "floats int " + 3 * "int ")
def accumulate(
    weight: Any,
    weight_row: int,
    x: Any,
    x_row: int,
    out: Any,
    out_row: int,
    heads: int,
    num: int,
    size: int,
) -> None:
    """`add_weighted`, of matrices whose rows are so many numbers apart: in tiles of four rows of
    out and two vectors, and smaller ones where these end."""
    vectors = size // WIDTH
    for v in range(0, vectors, 2):
        for h in range(0, heads, 4):
            is_wide, rows = v + 1 < vectors, min(4, heads - h)
            n = v * WIDTH
            for r in range(0, rows, 4 if rows == 4 else 1):
                tile = (
                    behind(weight, (h + r) * weight_row),
                    weight_row,
                    behind(x, n),
                    x_row,
                    behind(out, (h + r) * out_row + n),
                    out_row,
                    num,
                )
                if rows == 4 and is_wide:
                    _add_four_by_two(*tile)
                elif rows == 4:
                    _add_four_by_one(*tile)
                elif is_wide:
                    _add_one_by_two(*tile)
                else:
                    _add_one_by_one(*tile)
    weight_hX, x_Kd = carray(weight, (heads, weight_row)), carray(x, (num, x_row))
    out_hd = carray(out, (heads, out_row))
    for h in range(heads):
        for i in range(vectors * WIDTH, size):
            total = out_hd[h, i]
            for k in range(num):
                total += weight_hX[h, k] * x_Kd[k, i]
            out_hd[h, i] = total
