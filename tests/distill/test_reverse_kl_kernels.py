"""The kernels of the loss equal their torch reference; tests/backbone/kernels says on which device
they run here."""

import importlib.util
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distill import kernels, reverse_kl_tile
from distill.reverse_kl import Head, ReverseKL, reverse_kl

pytest.importorskip("triton")
place = Path(__file__).parents[1] / "backbone" / "kernels" / "conftest.py"
spec = importlib.util.spec_from_file_location("kernels_conftest", place)
assert spec is not None
assert spec.loader is not None
interpreter: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interpreter)
if interpreter.INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import_module("distill.kernels.tile")

SIZES = [(1, 1), (3, 29), (5, 130), (2, 4096), (2, 9000)]
"""R, V; 9,000: three blocks, the last one not whole."""
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)]  # the interpreter cuts bits off


@pytest.fixture(params=["cpu", *interpreter.CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if (request.param == "cpu") != interpreter.INTERPRETED:
        pytest.skip("triton compiles in this process, or interprets: see TRITON_INTERPRET")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if interpreter.INTERPRETED:
            interpreter.interpret(patch)
        yield torch.device(request.param)


def draw(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(device)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_sweep_equals_the_reference(size: tuple[int, int], device: torch.device) -> None:
    from distill.kernels.tile import compare

    student, teacher = (draw(*size, device=device, seed=i) for i in (0, 1))
    z, y = student.double() * 0.7, teacher.double() * 1.3
    wanted = reverse_kl_tile.compare(z.clone(), y.clone(), torch.empty_like(z))
    maximum, total, _, top, _, gap = wanted
    wanted[5] = gap + total * (maximum - top)  # the kernel's D is not short of it
    found = compare(student, teacher, 0.7, 1.3)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(teacher.double(), z - y, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_the_second_sweep_equals_the_reference(
    size: tuple[int, int], dtype: torch.dtype, rtol: float, device: torch.device
) -> None:
    from distill.kernels.tile import slope

    student, gap = (draw(*size, device=device, seed=i) for i in (2, 3))
    mean, factor = (draw(size[0], device=device, seed=i) for i in (4, 5))
    unit, maximum = 0.7, student.amax(dim=-1) * 0.7
    wanted = gap.double()
    exp = (student.double() * unit - maximum.double()[:, None]).exp2()
    reverse_kl_tile.slope(wanted, exp, mean.double(), factor.double())
    found = slope(student, gap, unit, maximum, mean, factor, dtype)
    assert found.dtype == dtype
    assert (found is gap) == (dtype == torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1e-5)


def solve(hidden: Tensor, head: Head, teachers: list[tuple[Tensor, Head]]) -> list[Tensor]:
    """Results and gradients."""
    assert head.bias is not None
    leaves = (hidden, head.weight, head.bias)
    kl: ReverseKL = reverse_kl(hidden, head, teachers, temperature=0.7, tile_rows=4)
    values = (kl.loss.detach(), kl.per_teacher, kl.entropy, kl.logsumexp)
    return [*values, *torch.autograd.grad(kl.loss, leaves)]


@pytest.mark.parametrize("num_teachers", [1, 3])
def test_the_loss_is_the_same_with_and_without_kernels(
    num_teachers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = draw(10, 6, device=device).requires_grad_()
    head = Head(draw(29, 6, device=device).requires_grad_(), draw(29, device=device), 0.5)
    assert head.bias is not None
    head.bias.requires_grad_()
    teachers = [
        (
            draw(10, 4, device=device, seed=i),
            Head(draw(29, 4, device=device, seed=i), None, 0.3 * i),
        )
        for i in range(1, num_teachers + 1)
    ]
    monkeypatch.setattr(reverse_kl_tile, "use_kernels", lambda x: False)  # pyright: ignore[reportUnknownLambdaType]
    wanted = solve(hidden, head, teachers)
    monkeypatch.setattr(reverse_kl_tile, "use_kernels", lambda x: True)  # pyright: ignore[reportUnknownLambdaType]
    found = solve(hidden, head, teachers)
    for ours, reference in zip(found, wanted, strict=True):
        atol = 1e-5 * float(reference.abs().max())
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=atol)


@pytest.fixture
def narrow_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU's products of 16-bit numbers that are summed in float32, which a CPU has not."""

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return out.copy_(a.to(dtype) @ b.to(dtype))

    def addmm(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return out.copy_(c + a.to(dtype) @ b.to(dtype))

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(reverse_kl_tile, "is_narrow", lambda *x: x[1].dtype == torch.bfloat16)  # pyright: ignore[reportUnknownLambdaType]
    yield
    library._destroy()


@pytest.mark.parametrize("uses_kernels", [False, True])
def test_16_bit_numbers_are_multiplied_as_they_are_and_summed_in_float32(
    uses_kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    def problem(dtype: torch.dtype) -> list[Tensor]:
        models = [(draw(10, 6, device=device, seed=i), draw(29, 6, device=device)) for i in (1, 2)]
        wide = [x.bfloat16() for pair in models for x in pair]
        bias = draw(29, device=device, seed=7).bfloat16()
        hidden, head, *teacher = (x.to(dtype) for x in wide)
        leaves = [x.requires_grad_() for x in (hidden, head, bias.to(dtype))]
        return solve(leaves[0], Head(leaves[1], leaves[2], 0.3), [(teacher[0], Head(teacher[1]))])

    wanted = problem(torch.float64)
    if device.type == "cpu":
        request.getfixturevalue("narrow_products")
    monkeypatch.setattr(reverse_kl_tile, "use_kernels", lambda x: uses_kernels)  # pyright: ignore[reportUnknownLambdaType]
    found = problem(torch.bfloat16)
    dtypes = [*[torch.float32] * 3, torch.float64, *[torch.bfloat16] * 3]
    assert [x.dtype for x in found] == dtypes
    for i, (ours, reference) in enumerate(zip(found, wanted, strict=True)):
        tolerance = 1e-5 if i < 3 else 2**-6  # the logits' gradient and the result are rounded
        atol = tolerance * float(reference.abs().max())
        torch.testing.assert_close(ours.double(), reference, rtol=0, atol=atol)


def test_a_row_that_is_not_finite_stays_so(device: torch.device) -> None:
    from distill.kernels.tile import compare

    for value in (float("nan"), float("inf")):
        student, teacher = (draw(3, 29, device=device, seed=i) for i in (0, 1))
        student[1, 7] = value
        found = compare(student, teacher, 1.0, 1.0)
        assert found[1].isfinite().tolist() == [True, False, True]


def test_kernels_are_for_float32_on_a_gpu() -> None:
    assert not kernels.use_kernels(torch.zeros(1))
    with FakeTensorMode():
        assert kernels.use_kernels(torch.zeros(1, device="cuda"))
        assert not kernels.use_kernels(torch.zeros(1, device="cuda", dtype=torch.float64))
