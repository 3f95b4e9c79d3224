"""Gradient checkpointing: the same bits, computed twice and not kept.

`gradient_checkpointing_enable` is what TRL's trainers call by default; a layer is the unit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.backbone import V4ForCausalLM
from posttrain.backbone.presets import CSA, HCA, SLIDING


@pytest.fixture
def model() -> V4ForCausalLM:
    """Six layers; window (7), top-k (4) and rates (4, 8) shorter than the documents."""
    kinds = [SLIDING, CSA, HCA, CSA, HCA, CSA]
    return small_model(kinds, mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 4)


def draw(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, columns), padded on the left, on the right and not at all."""
    ids = torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, -9:] = 0
    return ids, mask


def loss_of(model: V4ForCausalLM, columns: int = 40) -> Tensor:
    ids, mask = draw(3, columns)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert loss is not None
    return loss


def gradients(model: V4ForCausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [
        name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)
    ]
    assert different == []


KINDS: Sequence[dict[str, Any] | None] = (None, {"use_reentrant": False}, {"use_reentrant": True})


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same_bits(
    model: V4ForCausalLM, kind: dict[str, Any] | None
) -> None:
    wanted = gradients(model)
    assert all(g.any() for n, g in wanted.items() if ".indexer." in n)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    assert model.is_gradient_checkpointing
    assert_same_bits(gradients(model), wanted)
    model.gradient_checkpointing_disable()
    assert_same_bits(gradients(model), wanted)


def kept_bytes(model: V4ForCausalLM, columns: int) -> int:
    """Of activations that a forward leaves for its backward: each storage once, no parameter."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, columns)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()  # frees what the checkpoints hold
    return size


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_a_sixth_of_the_activations_at_most(
    model: V4ForCausalLM, kind: dict[str, Any] | None
) -> None:
    # six layers: what is kept is less than one of them keeps by itself, besides its input
    plain = kept_bytes(model, 96)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    assert kept_bytes(model, 96) < plain / 6


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def num_products(model: V4ForCausalLM, *, is_backward_too: bool = True) -> int:
    with Products() as products:
        loss = loss_of(model)
        if is_backward_too:
            loss.backward()
    return products.count


def test_checkpointing_runs_every_layers_forward_a_second_time(model: V4ForCausalLM) -> None:
    plain, forward = num_products(model), num_products(model, is_backward_too=False)
    model.gradient_checkpointing_enable()
    again = num_products(model) - plain
    # recomputing ends with the last tensor that backward needs; embedding and head stay outside
    assert 0.7 * forward < again < forward


def test_every_second_layer_lies_between(model: V4ForCausalLM) -> None:
    plain, wanted = num_products(model), gradients(model)
    model.gradient_checkpointing_enable()
    all_layers = num_products(model)
    try:
        model.gradient_checkpointing_enable(every_n_layers=2)
    except TypeError:
        pytest.skip("this transformers checkpoints all layers or none")
    assert plain < num_products(model) < all_layers
    assert_same_bits(gradients(model), wanted)


def test_evaluation_and_frozen_embeddings(model: V4ForCausalLM) -> None:
    model.gradient_checkpointing_enable()
    for parameter in model.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    found = gradients(model)
    model.gradient_checkpointing_disable()
    assert_same_bits(found, gradients(model))
    model.gradient_checkpointing_enable()
    ids, mask = draw(3, 40)
    with torch.no_grad():
        training = model(ids, attention_mask=mask).logits
        served = model.eval()(ids, attention_mask=mask).logits
    # an expert's rows are filled up to whole blocks in serving, so the last bits may differ
    torch.testing.assert_close(served, training, atol=2e-6, rtol=0)


def test_a_backward_under_autocast_is_that_outside() -> None:
    model, ids = small_model(), torch.arange(3, 33)[None]
    found: list[dict[str, Tensor]] = []
    for is_inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        atol = 0.05 * float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[1][name], gradient, rtol=0.05, atol=atol, msg=name)


def test_nothing_is_kept_once_the_backward_is_through() -> None:
    """A loss that is still held keeps no activation of the attention's."""
    model, ids = small_model(), torch.arange(3, 61).repeat(2)[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
    kept = [value for node in seen for value in getattr(node, "__dict__", {}).values()]
    kept = [item for value in kept for item in (value if isinstance(value, list) else [value])]
    assert len(seen) > 50
    assert not [item for item in kept if isinstance(item, Tensor)]
