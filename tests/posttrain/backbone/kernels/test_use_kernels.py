"""Kernels are a choice of the device, and triton stays optional."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import posttrain.backbone
from posttrain.backbone.kernels import use_kernels

BACKBONE = Path(posttrain.backbone.__file__).parent


def test_tensors_on_cpu_use_none() -> None:
    assert not use_kernels(torch.zeros(1))


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
    kernels = BACKBONE / "kernels"
    needs_triton = {f"{kernels.parent.name}.kernels.{p.stem}" for p in kernels.glob("[!_]*.py")}
    for path in [*BACKBONE.glob("*.py"), kernels / "__init__.py"]:
        for name in imported_at_once(ast.parse(path.read_text("utf-8"))):
            assert not name.startswith("triton"), path
            assert name.removeprefix("posttrain.") not in needs_triton, path
