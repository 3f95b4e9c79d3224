"""A loop's bits do not hang on where its arrays lie."""

from typing import Any

import numba
import numpy as np
import pytest

from posttrain.backbone.host.layout import sums_by_layout
from posttrain.backbone.host.loops import REORDERED, check


def adds_and_writes(x_C: Any, y_C: Any, out_C: Any) -> Any:
    total = np.float32(0.0)
    for c in range(x_C.size):
        out_C[c] = x_C[c] * y_C[c]
        total += out_C[c]
    return total


def adds_to_a_place(x_C: Any, y_C: Any, out_RA: Any) -> None:
    for r in range(out_RA.shape[0]):  # its check is made once, before all rows
        for c in range(x_C.size):
            out_RA[r, 0] += x_C[c] * y_C[c]


def adds_then_writes(x_C: Any, y_C: Any, out_C: Any) -> Any:
    total = np.float32(0.0)
    for c in range(x_C.size):
        total += x_C[c] * y_C[c]
    for c in range(x_C.size):
        out_C[c] = x_C[c] * y_C[c]
    return total


def code_of(function: Any, out: Any = numba.float32[::1]) -> str:
    found: Any = numba.njit(fastmath=REORDERED, error_model="numpy")(function)
    found.compile((numba.float32[::1], numba.float32[::1], out))
    return next(iter(found.inspect_llvm().values()))


@pytest.mark.parametrize(
    ("loop", "out"),
    [(adds_and_writes, numba.float32[::1]), (adds_to_a_place, numba.float32[:, :])],
)
def test_a_sum_in_a_loop_that_writes_is_found_and_refused(loop: Any, out: Any) -> None:
    code = code_of(loop, out)
    assert sums_by_layout(code)
    with pytest.raises(RuntimeError, match="some_loop adds up and writes in one loop"):
        check("some_loop", code)


def test_a_sum_in_a_loop_of_its_own_is_not() -> None:
    code = code_of(adds_then_writes)
    assert "vector.memcheck" in code  # the loop that writes
    assert sums_by_layout(code) == []
    check("some_loop", code)
