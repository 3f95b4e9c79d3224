"""Kernels are a choice of the device, and triton stays optional."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import posttrain.backbone
from posttrain.backbone import kernels
from posttrain.backbone.kernels import use_kernels

BACKBONE = Path(posttrain.backbone.__file__).parent


def test_tensors_on_cpu_use_none() -> None:
    assert not use_kernels(torch.zeros(1))


def test_what_the_kernels_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = [torch.zeros(1, device="cuda", dtype=d) for d in (torch.bfloat16, torch.int8)]
        assert all(use_kernels(x) for x in on_gpu)
        assert not use_kernels(torch.zeros(1, device="cuda", dtype=torch.float64))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not any(use_kernels(x) for x in on_gpu)
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "_has_triton", lambda: False)
        assert not any(use_kernels(x) for x in on_gpu)


def test_every_user_of_the_kernels_is_in_the_tests_of_their_wiring() -> None:
    asks = {p.stem for p in BACKBONE.glob("*.py") if "import use_kernels" in p.read_text("utf-8")}
    tests = Path(__file__).with_name("test_wiring.py").read_text("utf-8")
    (users,) = [line for line in tests.splitlines() if line.startswith("USERS = ")]
    assert set(ast.literal_eval(users.removeprefix("USERS = "))) == asks


@pytest.mark.gpu
def test_tensors_on_a_gpu_use_them() -> None:
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert use_kernels(torch.zeros(1, device="cuda"))


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """What a module imports when it is imported itself, functions' bodies aside."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not isinstance(child, ast.FunctionDef):
            yield from imported_at_once(child)


def test_importing_the_backbone_does_not_import_triton() -> None:
    folder = BACKBONE / "kernels"
    needs_triton = {f"{folder.parent.name}.kernels.{p.stem}" for p in folder.glob("[!_]*.py")}
    for path in [*BACKBONE.glob("*.py"), folder / "__init__.py"]:
        for name in imported_at_once(ast.parse(path.read_text("utf-8"))):
            assert not name.startswith("triton"), path
            assert name.removeprefix("posttrain.") not in needs_triton, path
