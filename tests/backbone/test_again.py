"""What a long batch forms again in its backward: the same bits, and not kept."""

import weakref
from typing import Any

import pytest
import torch
from small_v4 import small_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from posttrain.backbone import again
from posttrain.backbone.again import Form, Forms, form_again, forming
from posttrain.backbone.fake_quant import PARTS

READERS = ("attn_hc", "ffn_hc", "self_attn", "mlp")
"""Modules of a layer, whose inputs are streams and norms."""


def draw() -> Tensor:
    return torch.randint(3, 40, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("parts", [(), PARTS])
def test_streams_and_norms_are_formed_again_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...], *, recomputes: bool
) -> None:
    model: Any = small_model(seed=3, fake_quantization=list(parts)).train()
    if recomputes:
        older = model.gradient_checkpointing_enable  # warns that it has a new name, where it has
        getattr(model, "activation_checkpointing_enable", older)()
    held: list[weakref.ref[Tensor]] = []

    def note(_: Any, args: tuple[Tensor, ...]) -> None:
        held.append(weakref.ref(args[0]))

    for layer in model.model.layers:
        for name in READERS:
            getattr(layer, name).register_forward_pre_hook(note)
    gradients: list[list[Tensor]] = []
    for kept in (0, 1000):
        monkeypatch.setattr(again, "KEPT", kept)
        held.clear()
        model.zero_grad()
        loss = model(draw(), labels=draw()).loss
        num_held = sum(ref() is not None for ref in held)
        assert kept or num_held <= (len(model.model.layers) if recomputes else 1)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_hooks_of_others_see_all_that_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who computes whole layers again, or keeps tensors elsewhere, still can."""
    x = torch.ones(30, 4, requires_grad=True)
    monkeypatch.setattr(again, "KEPT", 0)
    seen: list[torch.Size] = []

    def pack(saved: Tensor) -> Tensor:
        seen.append(saved.shape)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved), forming(x):
        y = x * 2
        form_again(y, lambda x: x * 2, x)
        y.square()
    assert seen == [y.shape]


def test_a_tensor_is_known_while_it_is_held_and_by_its_own_shape_alone() -> None:
    forms, x, y = Forms(), torch.ones(3, 4), torch.ones(3, 4) * 2
    forms.add(y, lambda x: x * 2, (x,))
    assert isinstance(forms.pack(y.detach()), Form)
    assert torch.equal(forms.unpack(forms.pack(y.detach())), y)
    assert isinstance(forms.pack(y.T), Tensor)
    assert isinstance(forms.pack(y[:2]), Tensor)
    other = y.detach()
    del y
    assert isinstance(forms.pack(other), Tensor)


def test_chains_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is formed does not all come from the first layer's."""
    monkeypatch.setattr(again, "LONGEST", 2)
    forms, x = Forms(), torch.ones(3)
    kinds: list[bool] = []
    held = [x]
    for _ in range(6):
        y = held[-1] * 2
        forms.add(y, lambda x: x * 2, (held[-1],))
        kinds.append(isinstance(forms.pack(y), Form))
        assert torch.equal(forms.unpack(forms.pack(y)), y)
        held.append(y)
    assert kinds == [True, True, False, True, True, False]
