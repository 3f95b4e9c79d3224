"""The MXFP4 kernels give the very bits of the torch codecs."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone import fp4
from posttrain.backbone.kernels import mxfp4 as kernel


@pytest.fixture(autouse=True)
def torch_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU fp4's functions would hand over to what is tested here."""
    monkeypatch.setattr(fp4, "use_kernels", lambda _: False)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers of many sizes, zeros and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-40, 40, (*shape[:-1], 1), generator=generator).float())
    return x * (torch.rand(shape, generator=generator) > 0.1)


def bits(x: Tensor) -> Tensor:
    """So that NaN equals itself and -0 is not 0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (2, 5, 96), (70, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_the_torch_codecs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = draw(shape).to(device, dtype)
    codes, scale = kernel.quantize_mxfp4(x)
    right_codes, right_scale = fp4.quantize_mxfp4(x)
    assert codes.dtype == right_codes.dtype
    assert torch.equal(codes, right_codes)
    assert torch.equal(bits(scale), bits(right_scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_at_every_scale_is_read_as_by_torch(
    dtype: torch.dtype, device: torch.device
) -> None:
    # the interpreter has no subnormal bf16, and 0.5 * 2^(1 - 127) is one
    bytes_G = torch.arange(0 if dtype == torch.float32 else 2, 256, dtype=torch.uint8)
    every_code_L = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    codes = every_code_L.expand(len(bytes_G), 256)
    scale = bytes_G[:, None].expand(-1, 16).contiguous().view(torch.float8_e8m0fnu)
    codes, scale = codes.to(device), scale.to(device)
    found = kernel.dequantize_mxfp4(codes, scale, dtype=dtype)
    right = fp4.dequantize_mxfp4(codes, scale, dtype=dtype)
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(bits(found.nan_to_num(0.0)), bits(right.nan_to_num(0.0)))


def test_midpoints_go_to_the_even_code(device: torch.device) -> None:
    # amax 6, so the scale is 1: halfway between codes 0|1, 1|2, ... 6|7, the even one of the two
    midpoints = [(a + b) / 2 for a, b in pairwise(E2M1)]
    x = torch.tensor([*midpoints, *(-m for m in midpoints), 6.0] + [0.0] * 17, device=device)
    even = [0, 2, 2, 4, 4, 6, 6]
    codes, scale = kernel.quantize_mxfp4(x[None])
    unpacked = fp4.unpack(codes)[0].tolist()
    assert unpacked[:15] == [*even, *(8 + e for e in even), 7]
    assert bits(scale).item() == 127


def test_scales_at_the_ends_of_float32(device: torch.device) -> None:
    # just below, at and above 1.5 * 2^n, where the scale steps up; subnormals; the largest float
    edges = torch.tensor([1.5 * 2.0**n for n in (-126, -125, -124, -3, 0, 1, 126)])
    up, down = torch.tensor(float("inf")), torch.tensor(0.0)
    edges = torch.cat([edges, edges.nextafter(up), edges.nextafter(down)])
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    edges = torch.cat([edges, torch.tensor([largest, least, 2.0**-130, 0.0, float("inf")])])
    x = torch.zeros(len(edges), 32)
    x[:, 3] = -edges
    codes, scale = kernel.quantize_mxfp4(x.to(device))
    right_codes, right_scale = fp4.quantize_mxfp4(x.to(device))
    assert torch.equal(bits(scale), bits(right_scale))
    assert torch.equal(codes, right_codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_group_with_nan_or_infinity_says_so(
    broken: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = draw((2, 64)).to(device, dtype)
    x[1, 40] = broken
    codes, scale = kernel.quantize_mxfp4(x)
    right_codes, right_scale = fp4.quantize_mxfp4(x)
    assert torch.equal(codes, right_codes)
    assert torch.equal(bits(scale), bits(right_scale))
    assert bits(scale).tolist()[1][1] == 255
    for back in (kernel.dequantize_mxfp4(codes, scale, dtype=dtype), kernel.fake_mxfp4(x)):
        assert back.isnan().nonzero().tolist() == [[1, i] for i in range(32, 64)]
        wanted = fp4.fake_mxfp4(x).nan_to_num(0.0)
        assert torch.equal(bits(back.nan_to_num(0.0)), bits(wanted))


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 40), (4, 7), (130, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantisation_is_the_torch_one_and_lets_gradients_through(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    x = draw(shape, seed=1).to(device, dtype).requires_grad_()
    out = kernel.fake_mxfp4(x)
    assert torch.equal(bits(out.detach()), bits(fp4.fake_mxfp4(x).detach()))
    grad = draw(shape, seed=2).to(device, dtype)
    out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_fake_quantisation_is_a_round_trip(device: torch.device) -> None:
    x = draw((4, 96), seed=3).to(device)
    back = kernel.dequantize_mxfp4(*kernel.quantize_mxfp4(x), dtype=torch.float32)
    assert torch.equal(bits(kernel.fake_mxfp4(x)), bits(back))


def test_no_numbers_at_all(device: torch.device) -> None:
    codes, scale = kernel.quantize_mxfp4(torch.zeros(0, 64, device=device))
    assert (codes.shape, scale.shape) == ((0, 32), (0, 2))
    assert kernel.dequantize_mxfp4(codes, scale, dtype=torch.bfloat16).shape == (0, 64)
    assert kernel.fake_mxfp4(torch.zeros(3, 0, 40, device=device)).shape == (3, 0, 40)


def test_a_width_of_no_whole_groups_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="a length of 33 does not divide into blocks of 32"):
        kernel.quantize_mxfp4(torch.zeros(2, 33, device=device))
