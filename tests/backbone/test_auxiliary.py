"""An attached loss trains its parameters by `scale`, whatever happens to the hidden states."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.backbone.auxiliary import attach


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Layer(nn.Module):
    """y = tanh(x W), and an auxiliary loss of another matrix on the detached input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(5, 5, seed=seed))
        self.side = nn.Parameter(draw(5, seed=seed + 100))

    def hidden(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()

    def loss(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.side).square().mean()

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return attach(self.hidden(x), [self.loss(x)], scale)


def gradients(layers: list[Layer]) -> list[Tensor]:
    found = [p.grad for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.zero_grad()
    return [torch.zeros(()) if g is None else g.clone() for g in found]


def added_up(
    layers: list[Layer], x: Tensor, main: Callable[[Tensor], Tensor], scale: float
) -> None:
    """What `attach` stands for: backward through main + scale * the sum of the layers' losses."""
    total = torch.zeros((), dtype=x.dtype)
    for layer in layers:
        total = total + scale * layer.loss(x)
        x = layer.hidden(x)
    (main(x) + total).backward()


def test_by_hand() -> None:
    # hidden = 2 h with h = (1, 2); loss = v^2 with v = 3: d hidden.sum() / dh = 2, dL/dv = 2 v / 4
    h = torch.tensor([1.0, 2.0], requires_grad=True)
    v = torch.tensor(3.0, requires_grad=True)
    out = attach(2 * h, [v.square()], 0.25)
    assert torch.equal(out, torch.tensor([2.0, 4.0]))
    out.sum().backward()
    assert h.grad is not None
    assert h.grad.tolist() == [2.0, 2.0]
    assert v.grad is not None
    assert v.grad.item() == 1.5


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("part", [slice(None), slice(-1, None), slice(0, 0)])
def test_every_layer_trains_as_if_the_losses_were_added_up(
    reentrant: bool | None, part: slice
) -> None:
    layers, x = [Layer(seed) for seed in range(3)], draw(4, 5, seed=50).requires_grad_()

    def main(y: Tensor) -> Tensor:
        return y[part].pow(3).sum()  # GRPO takes the last columns: the gradient is partly zero

    added_up(layers, x, main, scale=0.3)
    wanted = gradients(layers)
    y = x
    for layer in layers:
        y = (
            layer(y, 0.3)
            if reentrant is None
            else checkpoint(layer, y, 0.3, use_reentrant=reentrant)
        )
    main(y).backward()
    torch.testing.assert_close(gradients(layers), wanted, rtol=1e-12, atol=1e-14)


def test_a_loss_that_left_its_checkpoint_trains_too() -> None:
    layers, x = [Layer(seed) for seed in range(3)], draw(4, 5, seed=51)
    added_up(layers, x, lambda y: y.square().sum(), scale=1.0)
    wanted = gradients(layers)

    def both(layer: Layer, y: Tensor) -> tuple[Tensor, Tensor]:
        return layer.hidden(y), layer.loss(y)

    y, losses = x, list[Tensor]()
    for layer in layers:
        y, loss = checkpoint(both, layer, y, use_reentrant=False)
        losses.append(loss)
    attach(y, losses, 1.0).square().sum().backward()
    torch.testing.assert_close(gradients(layers), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cuts", [1, 2, 5])
def test_one_over_n_gives_the_mean_over_accumulated_batches(cuts: int) -> None:
    layer, x = Layer(0), draw(10, 5, seed=52)
    added_up([layer], x, torch.mean, scale=1.0)  # equal parts: the mean of means is the mean
    wanted = gradients([layer])
    for rows in x.chunk(cuts):
        (layer(rows, 1 / cuts).mean() / cuts).backward()
    torch.testing.assert_close(gradients([layer]), wanted, rtol=1e-12, atol=1e-14)


def test_the_size_of_the_main_loss_does_not_matter() -> None:
    layer, x = Layer(0), draw(4, 5, seed=53)
    for factor in (1.0, 1e-6, 0.0):
        (factor * layer(x, 2.0).sum()).backward()
        assert layer.side.grad is not None
        wanted = torch.autograd.grad(2.0 * layer.loss(x), layer.side)[0]
        torch.testing.assert_close(layer.side.grad, wanted, rtol=1e-12, atol=0)
        layer.zero_grad()


def test_a_loss_scalers_tensor_is_a_scale_and_dtypes_may_differ() -> None:
    side = torch.tensor([1.0, 2.0], requires_grad=True)
    hidden = draw(3, 4, seed=54, dtype=torch.bfloat16).requires_grad_()
    out = attach(hidden, [side.square().sum()], torch.tensor(512.0))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert side.grad is not None
    assert side.grad.tolist() == [1024.0, 2048.0]
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))


def test_frozen_hidden_states_still_carry_the_loss_and_a_constant_loss_is_ignored() -> None:
    side = torch.tensor(3.0, requires_grad=True)
    out = attach(draw(2, 2, seed=55), [side.square(), torch.tensor(1.0)], 1.0)
    out.sum().backward()
    assert side.grad is not None
    assert side.grad.item() == 6.0


def test_without_losses_or_gradients_nothing_happens() -> None:
    hidden = draw(2, 2, seed=56).requires_grad_()
    assert attach(hidden, [], 1.0) is hidden
    side = torch.tensor(3.0, requires_grad=True)
    with torch.no_grad():
        assert not attach(2 * hidden, [side.square()], 1.0).requires_grad
    attach(hidden, [side.square()], 1.0)  # no backward reaches it
    assert side.grad is None


def test_a_loss_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"losses\[1\] is \(3,\)"):
        attach(torch.zeros(3), [torch.zeros(()), torch.zeros(3)], 1.0)
