"""The innermost loop of a weighted sum of rows, written in vectors: what stays in registers is said
here, since compilers put it into memory where a loop over rows is around one over columns.

A vector is eight numbers wide; a processor with narrower ones takes two for it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDTH = 8

_FLOAT, _INT, _LANE = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, WIDTH)


def weighted_sum(rows: int, vectors: int) -> Any:
    """For loops: `add(weight, weight_row, x, x_row, out, out_row, num)`, pointers to float32 and
    the numbers from row to row. To `vectors` vectors of each of `rows` rows of out it adds sum over
    k < num of weight[row, k] x[k], one k after the other, product and sum rounded together."""

    @intrinsic
    def add(
        typing: Any,
        weight: Any,
        weight_row: Any,
        x: Any,
        x_row: Any,
        out: Any,
        out_row: Any,
        num: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _emit(builder, args, rows, vectors)
            return context.get_dummy_value()

        return types.void(weight, types.intp, x, types.intp, out, types.intp, types.intp), generate

    return add


def _emit(b: Any, args: Any, rows: int, vectors: int) -> None:
    """The instructions, behind those that are there."""
    weight, weight_row, x, x_row, out, out_row, num = args
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    fused = cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{WIDTH}f32")
    places = [
        b.gep(out, [b.add(b.mul(_INT(row), out_row), _INT(WIDTH * vector))])
        for row in range(rows)
        for vector in range(vectors)
    ]
    weights = [b.gep(weight, [b.mul(_INT(row), weight_row)]) for row in range(rows)]
    first = [_load(b, place) for place in places]
    before = b.block
    test, body, end = (b.append_basic_block(name) for name in ("test", "body", "end"))
    b.branch(test)
    b.position_at_end(test)
    k = b.phi(_INT)
    sums = [b.phi(_VECTOR) for _ in places]
    b.cbranch(b.icmp_signed("<", k, num), body, end)
    b.position_at_end(body)
    row_of_x = b.gep(x, [b.mul(k, x_row)])
    x_k = [_load(b, b.gep(row_of_x, [_INT(WIDTH * vector)])) for vector in range(vectors)]
    after = []
    for row in range(rows):
        share = _spread(b, b.load(b.gep(weights[row], [k])))
        after += [
            b.call(fused, [share, x_v, total])
            for x_v, total in zip(x_k, sums[row * vectors :], strict=False)
        ]
    k.add_incoming(_INT(0), before)
    k.add_incoming(b.add(k, _INT(1)), body)
    for total, old, new in zip(sums, first, after, strict=True):
        total.add_incoming(old, before)
        total.add_incoming(new, body)
    b.branch(test)
    b.position_at_end(end)
    for total, place in zip(sums, places, strict=True):
        b.store(total, b.bitcast(place, _VECTOR.as_pointer())).align = 4


def _load(b: Any, place: Any) -> Any:
    """The vector that begins there."""
    found = b.load(b.bitcast(place, _VECTOR.as_pointer()))
    found.align = 4
    return found


def _spread(b: Any, number: Any) -> Any:
    """A vector of this number alone."""
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    one = b.insert_element(nothing, number, _LANE(0))
    return b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_LANE, WIDTH), [0] * WIDTH))


def _behind(typing: Any, place: Any, count: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return place(place, types.intp), generate


behind: Any = intrinsic(_behind)
"""For loops: `behind(place, count)`, the pointer so many numbers behind another."""
