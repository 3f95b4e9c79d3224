"""What the backward of a long batch forms once more in place of keeping it: norms, streams, rounded
inputs and the like, each a pass over what is kept anyway, and the same bits.

    with forming(x_TH):
        y = norm(x);  form_again(y, norm, x)
        z = linear(y)  # would keep y, and keeps how it was formed
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils.generic import maybe_autocast

from posttrain.backbone.host import use_host_loops

KEPT = 4096
"""Batches of up to so many tokens keep what takes time to form."""

LONGEST = 6
"""Formed one from another at most: streams would all come from the first layer's."""


@dataclass(frozen=True)
class Form:
    """How a tensor was formed."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor | Form, ...]
    depth: int

    def __call__(self) -> Tensor:
        return self.function(*(x() if isinstance(x, Form) else x for x in self.inputs))


class Forms:
    """Hooks of what is saved within `forming`; a tensor is known as long as it is held."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], Form]] = {}

    def pack(self, x: Tensor) -> Tensor | Form:
        """Autograd hands over another object of the same memory."""
        ref, form = self.known.get(x.data_ptr(), (None, None))
        held = ref() if ref else None
        is_known = held is not None and held.shape == x.shape and held.stride() == x.stride()
        return form if form and is_known else x

    def unpack(self, kept: Tensor | Form) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        device = torch.get_default_device().type
        with torch.no_grad(), maybe_autocast(device_type=device, enabled=False):
            return kept()

    def add(self, x: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        packed = tuple(self.pack(tensor.detach()) for tensor in inputs)
        depth = 1 + max(p.depth if isinstance(p, Form) else 0 for p in packed)
        if depth <= LONGEST:
            self.known[x.data_ptr()] = weakref.ref(x), Form(function, packed, depth)


@contextmanager
def forming(x_TH: Tensor) -> Generator[None]:
    """What is called here forms again what `form_again` is told of, if `x_TH` is a long batch in
    host loops and nobody else has hooks: who computes whole layers again, or keeps tensors
    elsewhere, would see nothing of it."""
    is_long = len(x_TH) > KEPT and torch.is_grad_enabled() and use_host_loops(x_TH)
    if not is_long or _hooks() is not None:
        yield
        return
    forms = Forms()
    with saved_tensors_hooks(forms.pack, forms.unpack):
        yield
    forms.known.clear()


def form_again(x: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Tell that x is `function(*inputs)` to the bit, of which nothing is changed in place."""
    if torch.compiler.is_compiling():
        return
    hooks = _hooks()
    forms = getattr(hooks[0], "__self__", None) if hooks else None
    if isinstance(forms, Forms):
        forms.add(x, function, inputs)


def _hooks() -> tuple[Any, Any] | None:
    """Of what autograd saves; no public call tells of them."""
    inside: Any = vars(torch)["_C"]
    return inside._autograd._top_saved_tensors_default_hooks(True)
