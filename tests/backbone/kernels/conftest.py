"""One law, two devices: on "cpu" triton's interpreter runs the kernels, on "cuda" its compiler.

A process does one or the other, for a kernel is made to be interpreted or compiled when its module
is imported. Without a GPU the kernels are imported here, first, with TRITON_INTERPRET=1; with one
they are compiled, and the tests on "cpu" want a run of their own with that variable set. Triton's
own library stays as it is, for others in the process may compile with it.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

KERNELS = ("attend", "hyper", "indexer_topk", "mix", "mxfp4", "sinkhorn", "sparse_attention")


def load() -> bool:
    """Import the kernels to be interpreted, if that is what this process is for."""
    wants_interpreter = not torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ
    if find_spec("triton") is None or not wants_interpreter:
        return False
    with pytest.MonkeyPatch.context() as patch:
        import_module("triton")
        patch.setenv("TRITON_INTERPRET", "1")
        for name in KERNELS:
            import_module(f"posttrain.backbone.kernels.{name}")
    return True


INTERPRETED = load()


CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("triton compiles in this process: set TRITON_INTERPRET=1 to interpret")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("triton interprets in this process: unset TRITON_INTERPRET to compile")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):  # a GPU warns of nothing
        if INTERPRETED:
            interpret(patch)
        yield torch.device(request.param)


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter call triton's library, which was imported to be compiled, and loop to a
    bound: triton 3.6 takes int() of an array of one element, which numpy 2.4 refuses."""
    patch.setenv("TRITON_INTERPRET", "1")
    interpreter = import_module("triton.runtime.interpreter")
    compiled = import_module("triton.runtime.jit").JITFunction

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    patch.setattr(compiled, "__call__", call)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
