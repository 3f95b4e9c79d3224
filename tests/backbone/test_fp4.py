"""Laws of the codecs: the nearest of all codes, exact where they say so, and the oracle's bits."""

import contextlib
import hashlib
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.experts import run_experts
from posttrain.backbone.fp4 import (
    E4M3,
    E8M0,
    dequantize_fp8,
    dequantize_mxfp4,
    fake_fp8_activation,
    fake_fp8_blocks,
    fake_indexer_fp4,
    fake_mxfp4,
    fits_fp8,
    hadamard,
    mxfp4_to_fp8,
    pack,
    quantize_fp8,
    quantize_mxfp4,
    scale_of,
    unpack,
)
from posttrain.backbone.fp4_experts import PackedWeight, pack_experts

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hard_numbers(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights of many magnitudes, of ties, of edges of the float format, of zeros."""
    g = seeded(seed)
    normal = torch.randn(rows, columns, generator=g)
    if kind == "ties":  # quarters: every midpoint between two codes at scale 1
        return torch.randint(-24, 25, (rows, columns), generator=g) / 4
    if kind == "magnitudes":
        return normal * torch.randint(-30, 30, (rows, 1), generator=g).float().exp2()
    if kind == "tiny":
        return normal * torch.randint(-149, -120, (rows, columns), generator=g).float().exp2()
    if kind == "zeros":
        return normal * (torch.randint(0, 3, (rows, 1), generator=g) > 0)
    return normal


KINDS = ("normal", "ties", "magnitudes", "tiny", "zeros")


def brute_force(group: list[float]) -> list[float]:
    """One group by the definition: the least power of two that brings amax to 6 or less, then the
    nearest of the sixteen codes, of two equally near the even one. In Python's float64."""
    amax, exponent = max(map(abs, group)), -127
    while amax / 2.0**exponent > 6:
        exponent += 1
    table = FP4.tolist()
    found: list[float] = []
    for x in group:
        away = [abs(abs(x) / 2.0**exponent - m) for m in table]
        code = min(range(8), key=lambda c: (away[c], c % 2))
        found.append((-1 if x < 0 else 1) * table[code] * 2.0**exponent)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp4_takes_the_nearest_of_all_codes(kind: str) -> None:
    weight = hard_numbers(kind, 12, 64)
    wanted = [brute_force(group) for group in weight.view(-1, 32).tolist()]
    found = dequantize_mxfp4(*quantize_mxfp4(weight), dtype=torch.float32)
    assert torch.equal(found.view(-1, 32), torch.tensor(wanted))


def test_a_scale_is_the_least_power_of_two_that_holds_the_largest_number() -> None:
    exponent = torch.arange(-120, 120)
    edge = 6 * exponent.float().exp2()  # amax / 6 a power of two, and one float above and below
    for amax, step in (
        (edge, 0),
        (edge.nextafter(torch.tensor(torch.inf)), 1),
        (edge.nextafter(torch.tensor(0.0)), 0),
    ):
        assert torch.equal(scale_of(amax, 6.0).view(torch.uint8).int(), exponent.int() + 127 + step)
    for smallest in (0.0, 2.0**-140, 6 * 2.0**-127):  # no scale is less than 2^-127
        assert scale_of(torch.tensor(smallest), 6.0).view(torch.uint8).item() == 0
    broken = torch.tensor([torch.nan, torch.inf])
    assert scale_of(broken, 6.0).float().isnan().all()


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32])
def test_zeros_in_fp8_are_zeros(scale_dtype: torch.dtype) -> None:
    for value in (0.0, -0.0):
        codes, scale = quantize_fp8(torch.full((3, 130), value), scale_dtype=scale_dtype)
        assert dequantize_fp8(codes, scale, dtype=torch.float32).tolist() == [[0.0] * 130] * 3


def test_packing_keeps_every_pair_with_the_even_index_low() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).flatten()
    assert torch.equal(unpack(pack(pairs)), pairs)
    # 6.0 is code 7, -0.5 is code 9: (7, 9) is 0x97
    codes, scale = quantize_mxfp4(torch.tensor([[6.0, -0.5, *[0.0] * 30]]))
    assert codes.view(torch.uint8)[0, 0].item() == 0x97
    assert scale.float().item() == 1.0
    assert quantize_mxfp4(torch.full((32,), -0.0))[0].view(torch.uint8).tolist() == [0x88] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stored_number_survives_a_second_time(kind: str, dtype: torch.dtype) -> None:
    first = dequantize_mxfp4(*quantize_mxfp4(hard_numbers(kind, 8, 96)), dtype=dtype)
    again = dequantize_mxfp4(*quantize_mxfp4(first), dtype=dtype)
    assert torch.equal(first, again)
    assert torch.equal(fake_mxfp4(first), first)


def test_a_bf16_copy_of_the_master_gives_other_codes() -> None:
    master = torch.randn(256, 1024, generator=seeded(1))
    share = (quantize_mxfp4(master)[0] != quantize_mxfp4(master.bfloat16())[0]).float().mean()
    assert 0.002 < share.item() < 0.05  # bytes of two codes


ORACLE = {
    "normal": ("a6d4d6ec4bda1d9b", "1348f7af9c1503ea"),
    "ties": ("6e6d2a2359eca856", "c907e7f59d9efff2"),
    "magnitudes": ("3118df15300761ce", "7c246495b501f396"),
    "tiny": ("a0f39f48c88872bd", "93bb3037a049bfa5"),
    "zeros": ("9967fe0a3355a03b", "557bf807ac842b75"),
}
"""Of each kind's numbers, and of what torchao 0.18.0's MXTensor with RCEIL makes of them: it is not
installed with the tests, for transformers imports it, and it complains where it has no GPU."""


def digest(*parts: Tensor) -> str:
    data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in parts)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_that_the_oracle_gave(kind: str) -> None:
    numbers, bits = ORACLE[kind]
    weight = hard_numbers(kind, 64, 256, KINDS.index(kind))
    if digest(weight) != numbers:
        pytest.skip("this torch draws other numbers than those that the oracle was given")
    codes, scale = (x.view(torch.uint8) for x in quantize_mxfp4(weight))
    # numbers under 2^-127 * 6, half of float's least normal one, it takes for zeros
    assert digest(scale, codes * (scale > 0).repeat_interleave(16, -1)) == bits


def test_the_oracle_gives_the_same_bits() -> None:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # its compiled parts are for GPUs, and it says so
        mx: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    for seed, kind in enumerate(KINDS):
        weight = hard_numbers(kind, 64, 256, seed)
        mode = mx.ScaleCalculationMode.RCEIL
        oracle = mx.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, mode)
        codes, scale = quantize_mxfp4(weight)
        assert torch.equal(oracle.scale.view(torch.uint8), scale.view(torch.uint8))
        # numbers under 2^-127 * 6, half of float's least normal one, it takes for zeros
        is_above = (scale.view(torch.uint8) > 0).repeat_interleave(16, -1)
        wanted, found = oracle.qdata.view(torch.uint8), codes.view(torch.uint8)
        assert torch.equal(wanted[is_above], found[is_above])


@pytest.mark.parametrize("scale_dtype", [E8M0, torch.float32])
@pytest.mark.parametrize("shape", [(128, 256), (130, 70), (1, 1)])
def test_fp8_tiles_round_to_the_nearest_e4m3(
    shape: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=seeded(2))
    weight[:1] *= 300.0
    codes, scale = quantize_fp8(weight, scale_dtype=scale_dtype)
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    table = table[table.isfinite()]
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in shape))[::97].tolist():
        s = scale[row // 128, column // 128].float()
        scaled = weight[row, column] / s
        assert scaled.abs() <= 448.0001
        nearest = (table - scaled).abs().min()
        assert (codes[row, column].float() - scaled).abs() == nearest
    found = dequantize_fp8(codes, scale, dtype=torch.float32)
    spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(found, codes.float() * spread[: shape[0], : shape[1]])


def test_fp8_of_fp8_is_the_same_number_and_exact_in_bf16() -> None:
    weight = torch.randn(200, 300, generator=seeded(3))
    first = dequantize_fp8(*quantize_fp8(weight), dtype=torch.float32)
    assert torch.equal(dequantize_fp8(*quantize_fp8(first), dtype=torch.float32), first)
    assert torch.equal(first.bfloat16().float(), first)


def fp4_tile(low: int, high: int, seed: int) -> tuple[Tensor, Tensor]:
    """A 128 x 256 weight with every code, whose group scales span [low, high] in its first tile
    and are all 127 in its second."""
    g = seeded(seed)
    codes = torch.randint(0, 256, (128, 128), generator=g).to(torch.uint8).view(torch.int8)
    codes[:, 0] = 0x11  # 0.5 twice: the number that is lost first
    scale = torch.full((128, 8), 127, dtype=torch.uint8)
    scale[:, :4] = torch.randint(low, high + 1, (128, 4), generator=g).to(torch.uint8)
    scale[0, 0], scale[1, 0] = low, high
    return codes, scale.view(E8M0)


@pytest.mark.parametrize("span", [0, 1, 9, 13, 14])
def test_fp4_to_fp8_is_exact_while_scales_are_near(span: int) -> None:
    codes, scale = fp4_tile(110, 110 + span, span)
    assert fits_fp8(codes, scale).tolist() == [[True, True]]
    wanted = dequantize_mxfp4(codes, scale, dtype=torch.float32)
    weight, tile_scale = mxfp4_to_fp8(codes, scale)
    assert tile_scale.view(torch.uint8).tolist() == [[110 + span - 6, 121]]
    assert torch.equal(dequantize_fp8(weight, tile_scale, dtype=torch.float32), wanted)


def test_fp4_to_fp8_refuses_what_it_would_lose() -> None:
    codes, scale = fp4_tile(110, 125, 0)
    assert fits_fp8(codes, scale).tolist() == [[False, True]]
    with pytest.raises(ValueError, match=r"tile \(0, 0\).* 2\^15 apart"):
        mxfp4_to_fp8(codes, scale)
    codes[0, :16] = 0x08 - 0x80  # the group at 2^110 is all zeros, of both signs: it may be far
    scale.view(torch.uint8)[2:, :4] = 125
    assert fits_fp8(codes, scale).tolist() == [[True, True]]
    weight, tile_scale = mxfp4_to_fp8(codes, scale)
    found = dequantize_fp8(weight, tile_scale, dtype=torch.float32)
    assert torch.equal(found, dequantize_mxfp4(codes, scale, dtype=torch.float32))


def test_a_tile_of_zeros_converts_to_zeros() -> None:
    codes, scale = quantize_mxfp4(torch.zeros(128, 128))
    weight, tile_scale = mxfp4_to_fp8(codes, scale)
    assert not dequantize_fp8(weight, tile_scale, dtype=torch.float32).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_fake_quantising_gives_what_storage_gives_back(kind: str, device: str) -> None:
    weight = hard_numbers(kind, 16, 96).to(device)
    stored = dequantize_mxfp4(*quantize_mxfp4(weight), dtype=torch.float32)
    assert torch.equal(fake_mxfp4(weight), stored)
    assert torch.equal(fake_mxfp4(weight.view(2, 8, 96)), stored.view(2, 8, 96))


@pytest.mark.parametrize("fake", [fake_mxfp4, fake_fp8_blocks, fake_fp8_activation])
@pytest.mark.parametrize("shape", [(5, 128), (3, 2, 80), (2, 7), (0, 64)])
def test_gradients_pass_straight_through(fake: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=seeded(4), requires_grad=True)
    out = fake(x)
    assert out.shape == x.shape
    grad = torch.randn(shape, generator=seeded(5))
    out.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)
    assert torch.equal(fake(out.detach()), out)  # once rounded, it stays


@pytest.mark.parametrize("width", [16, 64, 80, 448])
def test_the_kv_cache_in_fp8_is_each_block_on_its_own(width: int) -> None:
    x = torch.randn(3, width, generator=seeded(6)).bfloat16()
    x[0, : min(width, 64)] = 1e-10  # far below the floor of serving's kernels: rounds to nothing
    whole = fake_fp8_blocks(x)
    assert whole.dtype == torch.bfloat16
    assert not whole[0, : min(width, 64)].any()
    for first in range(0, width, 64):
        block = x[:, first : first + 64].float()
        exponent = torch.ceil(torch.log2(block.abs().amax(-1, keepdim=True).clamp(1e-4) / 448))
        wanted = (block / exponent.exp2()).to(E4M3).float() * exponent.exp2()
        assert torch.equal(whole[:, first : first + 64].float(), wanted)


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_its_own_inverse_and_keeps_products(size: int) -> None:
    x = torch.randn(7, size, dtype=torch.float64, generator=seeded(7), requires_grad=True)
    y = torch.randn(7, size, dtype=torch.float64, generator=seeded(8))
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(hadamard(x) @ hadamard(y).T, x @ y.T, atol=1e-12, rtol=0)
    torch.autograd.gradcheck(hadamard, x[:1])
    i = range(size)
    signs = torch.tensor([[(-1.0) ** (a & b).bit_count() for a in i] for b in i])
    torch.testing.assert_close(hadamard(y), y @ signs.double() / size**0.5, atol=1e-12, rtol=0)
    assert torch.equal(hadamard(y)[2:3], hadamard(y[2:3]))  # a row's bits are its own


def test_hadamard_and_fp4_for_the_indexer() -> None:
    x = torch.randn(5, 4, 128, generator=seeded(9))
    assert torch.equal(fake_indexer_fp4(x), fake_mxfp4(hadamard(x)))
    with pytest.raises(ValueError, match="24 long"):
        hadamard(torch.zeros(2, 24))


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="40 does not divide into blocks of 32"):
        quantize_mxfp4(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="64 does not divide into blocks of 128"):
        fits_fp8(*quantize_mxfp4(torch.zeros(64, 128)))
    with pytest.raises(ValueError, match="48 input columns"):
        PackedWeight((2, 4, 48), dtype=torch.float32, device="cpu")


def make(seed: int = 0) -> Any:
    config = preset_config("tiny", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return V4ForCausalLM(config).eval()


@torch.no_grad()
def test_packed_experts_give_the_fake_quantised_models_logits_bit_for_bit() -> None:
    faked, packed = make(), make()
    for layer in faked.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name)
            weight.copy_(fake_mxfp4(weight))
    full = size_of(packed)
    pack_experts(packed)
    ids = torch.randint(0, 300, (3, 40), generator=seeded(10))
    assert torch.equal(packed(ids).logits, faked(ids).logits)
    experts = 3 * 8 * (128 + 64) * 128
    assert size_of(packed) == full - experts * 4 + experts * 17 // 32  # 4.25 bits a number
    packed.bfloat16()
    assert size_of(packed.model.layers[0].mlp.experts) == 8 * (128 + 64) * 128 * 17 // 32


def test_gradients_go_through_packed_experts_as_through_the_fake_quantised() -> None:
    faked, packed = make(), make()
    pack_experts(packed)
    with torch.no_grad():
        for layer in faked.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                weight.copy_(fake_mxfp4(weight))
    ids = torch.randint(0, 300, (2, 20), generator=seeded(13))
    for model in (faked, packed):
        model(ids, labels=ids).loss.backward()
    for name, parameter in packed.named_parameters():
        other = faked.get_parameter(name)
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, other.grad), name


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 33])
def test_the_used_experts_alone_give_the_same_bits(num_tokens: int) -> None:
    packed = make()
    pack_experts(packed)
    experts = packed.model.layers[1].mlp.experts
    x = torch.randn(num_tokens, 128, generator=seeded(14))
    expert = torch.rand(num_tokens, 8, generator=seeded(15)).argsort(-1)[:, :2]
    weight = torch.rand(num_tokens, 2, generator=seeded(16))
    used, place = experts.used(expert)
    assert used.num_experts == max(len(set(expert.flatten().tolist())), 1)
    assert torch.equal(run_experts(used, x, place, weight), run_experts(experts, x, expert, weight))


def size_of(model: Any) -> int:
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" not in n)]
    return sum(tensor.nbytes for tensor in tensors)


def test_a_packed_weight_is_read_expert_by_expert() -> None:
    weight = torch.randn(3, 8, 64, generator=seeded(11))
    packed = PackedWeight((3, 8, 64), dtype=torch.bfloat16, device="cpu")
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            packed.put(expert, rows, *quantize_mxfp4(weight[expert, rows]))
    assert len(packed) == 3
    assert torch.equal(packed.some(range(3)), fake_mxfp4(weight).bfloat16())
    x = torch.randn(5, 64, generator=seeded(12)).bfloat16()
    assert torch.equal(F.linear(x, packed[1]), F.linear(x, fake_mxfp4(weight[1]).bfloat16()))
