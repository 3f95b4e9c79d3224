"""RMSNorm and RoPE as functions of their own: equal to the equations, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone.decode_norm import normed, projected
from posttrain.backbone.norm import RMSNorm, V4RMSNorm, V4UnweightedRMSNorm
from posttrain.backbone.rope import rotate, rotations


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (1, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_norm_equals_its_equation(shape: tuple[int, ...], *, is_weighted: bool) -> None:
    x, weight = draw(*shape, seed=1), draw(shape[-1], seed=2)
    inputs = [x, weight] if is_weighted else [x]
    found: Any = RMSNorm.apply(x, weight if is_weighted else None, 1e-3)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = wanted * weight if is_weighted else wanted
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)
    upstream = draw(*shape, seed=3).detach()
    pairs = zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_modules_equal_stocks_on_views_and_in_bfloat16() -> None:
    x = draw(3, 8, 6, seed=4).detach().float().transpose(0, 1)
    theirs, ours = stock.DeepseekV4RMSNorm(6), V4RMSNorm(6)
    for norm in (theirs, ours):
        norm.weight.data = torch.linspace(0.5, 2, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x.bfloat16()), theirs(x.bfloat16()), atol=0.02, rtol=0.01)
    torch.testing.assert_close(
        V4UnweightedRMSNorm()(x), stock.DeepseekV4UnweightedRMSNorm()(x), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotating_equals_rotation_matrices(dtype: torch.dtype) -> None:
    x, position = draw(4, 3, 8, seed=5).detach().to(dtype).requires_grad_(), torch.arange(4) * 7
    inv_freq = torch.tensor([0.9, 0.1])
    found = rotate(x, rotations(inv_freq, position, 1.5).unsqueeze(1))
    angle = (position[:, None] * inv_freq).double()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1) * 1.5
    pairs = x.double()[..., 4:].unflatten(-1, (2, 2))
    turned = torch.einsum("tpij,thpj->thpi", turn.unflatten(-1, (2, 2)), pairs).flatten(-2)
    wanted = torch.cat([x.double()[..., :4], turned], dim=-1)
    atol, rtol = (0.02, 0.01) if dtype == torch.bfloat16 else (2e-6, 2e-6)
    torch.testing.assert_close(found.double(), wanted, atol=atol, rtol=rtol)
    upstream = draw(4, 3, 8, seed=6).detach()
    (a,) = torch.autograd.grad(found, x, upstream.to(dtype))
    (b,) = torch.autograd.grad(wanted, x, upstream)
    torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_decode_steps_norm_is_the_modules(dtype: torch.dtype) -> None:
    x = draw(5, 3, 7, seed=6).detach().to(dtype)
    x[0] = 0.0
    weighted = V4RMSNorm(7, eps=0.01)
    weighted.weight.data.copy_(draw(7, seed=7))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    with torch.no_grad():
        for module in (weighted.to(dtype), V4UnweightedRMSNorm(eps=0.01)):
            found = normed(module, x)
            assert found.dtype == dtype
            torch.testing.assert_close(found, module(x), atol=tolerance, rtol=tolerance)


def test_what_hangs_on_a_module_takes_part_in_a_decode_step() -> None:
    """Hooks, a forward put in the place of the class's, and classes of others, as adapters are."""

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x) + 1

    x = draw(2, 3, seed=8).detach().float()
    with torch.no_grad():
        for call, kind in ((projected, nn.Linear), (projected, Adapted), (normed, V4RMSNorm)):
            make: Any = kind
            for hang in ("nothing", "pre-hook", "hook", "forward"):
                module = make(3, 3) if call is projected else make(3)
                if hang == "pre-hook":
                    module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
                elif hang == "hook":
                    module.register_forward_hook(lambda _, __, out: out * 2)
                elif hang == "forward":
                    module.forward = lambda x: x * 3
                torch.testing.assert_close(call(module, x), module(x), atol=1e-6, rtol=1e-6)
