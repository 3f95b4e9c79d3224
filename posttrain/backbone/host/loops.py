"""How the loops are compiled: each by itself, with nothing of the others but their text.

A compiled function that others call is there in as many copies as callers, of which a process
takes the one that it has met first: other copies round otherwise, and so would processes that
compile and such that read what is kept. So what a `loop` calls is `within` it, or `outlined`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from llvmlite import binding
from numba import types

from posttrain.backbone.host.layout import sums_by_layout
from posttrain.compiled_loops import BUILDING, kept_in

F = TypeVar("F", bound=Callable[..., Any])

config: Any = vars(numba)["config"]
carray: Any = vars(numba)["carray"]

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""A sum of one token's numbers may go in vectors; NaN and infinities stay what they are."""

KINDS: dict[str, Any] = {
    "floats": types.CPointer(types.float32),
    "int": types.intp,
    "float": types.float32,
}

to_compile: list[Callable[[], object]] = []
"""In the process that builds: each compiles a loop."""

_outlined: list[Any] = []
"""What loops call by name is not to be freed."""


def loop(function: F) -> F:
    """`function`, for calls from Python, compiled at its first; it gives nothing back."""
    compiled: Any = _keeping(numba.njit, nogil=True)(function)
    if not os.environ.get(BUILDING):
        return compiled
    noted: Any = Noted(compiled)
    to_compile.append(noted.compile)
    return noted


class Noted:
    """A loop in the process that builds: not run, its arguments' types are taken down."""

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.signatures = compiled, dict[tuple[Any, ...], None]()

    def __call__(self, *args: Any) -> None:
        self.signatures[tuple(numba.typeof(x) for x in args)] = None

    def compile(self) -> None:
        for signature in self.signatures:
            self.compiled.compile(signature)
            check(self.compiled.__name__, self.compiled.inspect_llvm(signature))


def check(name: str, code: str) -> None:
    """Raises RuntimeError where a loop's bits would hang on its arrays' places."""
    if found := sums_by_layout(code):
        raise RuntimeError(f"{name} adds up and writes in one loop, in {', '.join(found)}")


def within(function: F) -> F:
    """`function`, put into the loops that call it."""
    inlined: Any = numba.njit(inline="always")
    return inlined(function)


def outlined(kinds: str) -> Callable[[F], F]:
    """A function without a result of such `KINDS`, compiled by itself as C's are; loops call it by
    name."""
    signature: Any = types.void(*(KINDS[kind] for kind in kinds.split()))

    def outline(function: Any) -> Any:
        name = f"posttrain_{function.__name__}"
        compiled, address = _keeping(numba.cfunc, signature), 1
        if os.environ.get(BUILDING):  # where nothing is run
            to_compile.append(lambda: check(name, compiled(function).inspect_llvm()))
        else:
            _outlined.append(compiled(function))
            address = _outlined[-1].address
        binding.add_symbol(name, address)
        return types.ExternalFunction(name, signature)

    return outline


def _keeping(decorator: Any, *args: Any, **options: Any) -> Callable[[Any], Any]:
    """numba's `decorator`, what it compiles being kept in `kept_in()`."""

    def decorate(function: Any) -> Any:
        usual, config.CACHE_DIR = config.CACHE_DIR, kept_in()
        options.update(cache=bool(kept_in()), fastmath=REORDERED, error_model="numpy")
        try:
            return decorator(*args, **options)(function)
        finally:
            config.CACHE_DIR = usual

    return decorate
