"""Laws of the distribution: what it carries, what it pins, and that its names are its own."""

import importlib.util
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import posttrain

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def script(path: str) -> Any:
    """scripts/preflight.py, say, which is no part of the packages."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_constraints_are_bare_exact_versions() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9]+(\.[0-9]+)*([ab]|rc|\.post)?[0-9]*", version), name


def test_what_was_tested_lies_within_what_is_allowed() -> None:
    required = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, required):
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_version_is_said_once_more_and_agrees() -> None:
    assert PROJECT["version"] == posttrain.__version__


def test_a_wheel_carries_the_packages_recipes_and_template(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in posttrain.SIBLINGS:
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"posttrain/recipes/{recipe.name}" in names
    assert "posttrain/templates/report.html.j2" in names
    assert not [name for name in names if name.startswith(("tests/", "recipes/", "scripts/"))]


@pytest.mark.parametrize(
    ("purpose", "disk_gb", "memory_gb", "said"),
    [
        ("install", 9.9, 16.0, "10 GB are needed to install"),
        ("install", 10.1, 0.5, "0.5 GB of memory are free"),
        ("run", 1.0, 16.0, "1.0 GB of disk in"),
        ("run", 16.0, 2.0, "3 GB are needed to run"),
    ],
)
def test_too_little_disk_or_memory_is_said_before_anything_is_done(
    purpose: str, disk_gb: float, memory_gb: float, said: str
) -> None:
    (line,) = script("scripts/preflight.py").lacks(purpose, ROOT, disk_gb, memory_gb)
    assert said in line


def test_enough_disk_and_memory_lack_nothing() -> None:
    assert list(script("scripts/preflight.py").lacks("run", ROOT, 10.0, 8.0)) == []


def test_the_budget_is_what_mixed_learned_from_over_what_specialists_and_opd_did() -> None:
    budget, merged = script("benchmarks/results.py").budget, {"base": 999, "sft/code": 60}
    merged |= {"grpo/code": 20, "opd": 20}
    (_, line) = budget({"tokens": {**merged, "sft/mixed": 30, "grpo/mixed": 120}})
    assert "from 150 tokens, all specialists and OPD together from 100 (ratio 1.50)" in line
    assert budget({"tokens": merged}) == []


@pytest.mark.parametrize("name", ["backbone.md", "distillation.md"])
def test_a_pages_table_is_what_benchmarks_measured(name: str) -> None:
    page = ROOT / "docs" / name
    found = script("benchmarks/tables.py").filled(page.read_text("utf-8"), page)
    assert found == page.read_text("utf-8")
