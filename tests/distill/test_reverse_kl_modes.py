"""What the fused loss does besides its value: heads with bias and scale, products and memory, and
how often a backward may be asked for."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from distill import reverse_kl_tile
from distill.reverse_kl import Head, default_tile_rows, reverse_kl

N, V, H = 13, 29, 6
PRODUCTS = ("mm", "addmm", "addmm_")


class Watch(TorchDispatchMode):
    """Counts matrix products of the vocabulary, and the elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products, self.largest = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket.__name__ in PRODUCTS
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def models(num_rows: int = N) -> tuple[list[Tensor], list[tuple[Tensor, Head]]]:
    """A student's hidden states, weight and bias, and two teachers of bias and scale."""
    student = [draw(num_rows, H), draw(V, H), draw(V)]
    teachers = [
        (draw(num_rows, 4, seed=1), Head(draw(V, 4, seed=1), draw(V, seed=1), 0.7)),
        (draw(num_rows, 7, seed=2), Head(draw(V, 7, seed=2), None, 1.3)),
    ]
    return [x.requires_grad_() for x in student], teachers


def loss_of(
    teachers: list[tuple[Tensor, Head]], tile_rows: int | None = None
) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, 1.7)
        return reverse_kl(hidden, head, teachers, temperature=0.8, tile_rows=tile_rows).loss

    return loss


def test_bias_and_scale_equal_the_dense_reference() -> None:
    (hidden, weight, bias), teachers = models()

    def logits(hidden: Tensor, head: Head) -> Tensor:
        assert head.bias is None or head.bias.shape == (V,)
        product = hidden @ head.weight.T
        return head.scale / 0.8 * (product if head.bias is None else product + head.bias)

    logp_NV = logits(hidden, Head(weight, bias, 1.7)).log_softmax(dim=-1)
    logq_NV = torch.stack([logits(*pair).log_softmax(dim=-1) for pair in teachers]).mean(dim=0)
    wanted = (logp_NV.exp() * (logp_NV - logq_NV)).sum(dim=-1).mean()
    found = loss_of(teachers, tile_rows=5)(hidden, weight, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    leaves = (hidden, weight, bias)
    for ours, reference in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-14)


def test_gradcheck_with_bias_and_scale() -> None:
    leaves, teachers = models(num_rows=3)
    assert torch.autograd.gradcheck(loss_of(teachers, tile_rows=2), leaves)


def test_bias_alone_gets_its_gradient() -> None:
    (hidden, weight, bias), teachers = models()
    loss = loss_of(teachers)
    (wanted,) = torch.autograd.grad(loss(hidden, weight, bias), (bias,))
    (found,) = torch.autograd.grad(loss(hidden.detach(), weight.detach(), bias), (bias,))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("frozen", "num_products"), [((), 4), (("head",), 3), (("hidden",), 3), (("hidden", "head"), 2)]
)
def test_products_of_a_tile(frozen: tuple[str, ...], num_products: int) -> None:
    hidden = draw(12, H).requires_grad_("hidden" not in frozen)
    head = draw(V, H).requires_grad_("head" not in frozen)
    teacher = (draw(12, 4), draw(V, 4))
    with Watch() as watch:
        reverse_kl(hidden, head, [teacher], tile_rows=4)
    assert watch.num_products == 3 * num_products
    with torch.no_grad(), Watch() as watch:
        reverse_kl(hidden, head, [teacher], tile_rows=4)
    assert watch.num_products == 3 * 2


def test_the_hidden_gradient_alone_can_be_formed_in_the_backward_to_the_same_bits() -> None:
    """By torch's own checkpoint: until then two products a tile, and no gradient in memory."""
    (plain, weight, bias), teachers = models()
    head = Head(weight.detach(), bias.detach(), 1.7)

    def loss(hidden: Tensor) -> Tensor:
        return reverse_kl(hidden, head, teachers[:1], temperature=0.8, tile_rows=5).loss

    wanted = loss(plain)
    (3 * wanted).backward()
    late = plain.detach().requires_grad_()
    with Watch() as before:
        found: Any = checkpoint(loss, late, use_reentrant=True, preserve_rng_state=False)
    with Watch() as after:
        (3 * found).backward()
    assert (before.num_products, after.num_products) == (3 * 2, 3 * 3)
    assert torch.equal(found, wanted)
    assert late.grad is not None
    assert plain.grad is not None
    assert torch.equal(late.grad, plain.grad)


def test_no_tensor_is_larger_than_a_tile_or_the_head() -> None:
    num_rows, num_tokens = 64, 500
    hidden, head = draw(num_rows, H).requires_grad_(), draw(num_tokens, H).requires_grad_()
    teachers = [(draw(num_rows, 4, seed=i), draw(num_tokens, 4, seed=i)) for i in range(5)]
    with Watch() as watch:
        reverse_kl(hidden, head, teachers, tile_rows=8).loss.backward()
    assert watch.largest <= max(8 * (num_tokens + 96), num_tokens * H)


@pytest.mark.parametrize("elements", [1, 2 * V, 5 * V + 1])
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_blocks_of_rows_change_nothing(
    elements: int, num_teachers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, teachers = models()
    loss = loss_of(teachers[:num_teachers])
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    monkeypatch.setattr(reverse_kl_tile, "BLOCK_ELEMENTS", elements)
    for found, whole in zip(torch.autograd.grad(loss(*leaves), leaves), wanted, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 1024, 1040])
def test_any_vocabulary_fits_its_strip(num_tokens: int) -> None:
    hidden = draw(5, H).requires_grad_()
    head, other = draw(num_tokens, H), draw(num_tokens, H, seed=3)
    kl = reverse_kl(hidden, head, [(hidden.detach(), other)])
    logp, logq = ((hidden @ x.T).log_softmax(dim=-1) for x in (head, other))
    wanted = (logp.exp() * (logp - logq)).sum(dim=-1)
    torch.testing.assert_close(kl.per_token, wanted.detach(), rtol=1e-11, atol=1e-14)


def test_a_graph_that_is_kept_gives_the_same_gradients_again() -> None:
    leaves, teachers = models()
    loss = loss_of(teachers)(*leaves)
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, leaves)
    for once, copy, again in zip(first, copies, second, strict=True):
        assert torch.equal(once, copy)
        torch.testing.assert_close(again, 1.5 * once, rtol=1e-14, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_second_derivative_is_refused() -> None:
    leaves, teachers = models()
    loss = loss_of(teachers)(*leaves)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


def test_function_transforms_are_refused() -> None:
    leaves, teachers = models()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss_of(teachers))(*(x.detach() for x in leaves))


def test_tiles_by_default() -> None:
    cpu = torch.device("cpu")
    assert [default_tile_rows(cpu, v) for v in (64, 65_536, 129_280, 10**7)] == [
        4096,
        512,
        256,
        128,
    ]


def test_a_student_that_is_its_teacher_has_no_gap_at_large_logits() -> None:
    hidden, head = (200 * draw(N, H)).float().requires_grad_(), draw(V, H).float().requires_grad_()
    kl = reverse_kl(hidden, head, [(hidden.detach(), head.detach())] * 2, tile_rows=4)
    kl.loss.backward()
    assert torch.equal(kl.per_teacher, torch.zeros(N, 2))
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros(N, H))
