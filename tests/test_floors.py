"""The house stands: imports point downward, and what must start fast imports nothing heavy."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
PACKAGES = ("posttrain", "specialists", "distill", "rewards")

FLOORS = (  # a module may import from floors below its own, and from its own row of one floor
    (("posttrain.compiled_loops",),),
    (
        (
            "posttrain.errors",
            "posttrain.files",
            "posttrain.config",
            "posttrain.metrics",
            "posttrain.job",
            "posttrain.adapters",
            "posttrain.hashes",
            "posttrain.judge_config",
        ),
        ("posttrain.backbone",),
        ("posttrain.optim", "posttrain.sharded"),
        ("posttrain.intervals",),
        ("posttrain.rollout.types",),
        (
            "distill.reverse_kl",
            "distill.reverse_kl_checks",
            "distill.reverse_kl_group",
            "distill.reverse_kl_tile",
            "distill.kernels",
        ),
        ("rewards",),
    ),
    (("posttrain.tokenizer",),),
    (("posttrain.chat",), ("posttrain.checkpoints",)),
    (
        ("posttrain.domains",),
        ("posttrain.rollout",),
        ("posttrain.merge", "posttrain.merge_config"),
        ("posttrain.generated",),
    ),
    (
        ("posttrain.tasks", "posttrain.judge", "posttrain.judge_prompts", "posttrain.transcripts"),
        ("posttrain.evaluate_config",),
        ("posttrain.report_config",),
    ),
    (("specialists",), ("distill",)),  # siblings: neither imports the other
    (
        ("posttrain.doctor",),
        ("posttrain.evaluate",),
        ("posttrain.generate",),
        (
            "posttrain.report",
            "posttrain.report_data",
            "posttrain.report_numbers",
            "posttrain.report_page",
            "posttrain.report_plots",
            "posttrain.report_words",
        ),
    ),
    (("posttrain.pipeline",),),
    (("posttrain.cli", "posttrain.__main__"),),
)

FREE_OF = {  # packages whose modules import no such thing, wherever they stand
    "rewards": ("posttrain", "specialists", "distill", "torch", "transformers", "trl", "ray"),
    "posttrain.backbone": ("specialists", "distill", "rewards", "trl", "ray"),
}

LIGHT = (
    "posttrain.cli",
    "posttrain.compiled_loops",
    "posttrain.config",
    "posttrain.domains",
    "posttrain.evaluate_config",
    "posttrain.job",
    "posttrain.judge_config",
    "posttrain.judge_prompts",
    "posttrain.merge_config",
    "posttrain.metrics",
    "posttrain.pipeline.checks",
    "posttrain.pipeline.plan",
    "posttrain.pipeline.recipe",
    "posttrain.pipeline.recipe_file",
    "posttrain.pipeline.run",
    "posttrain.report_config",
    "posttrain.rollout",
    "rewards",
    "specialists.config",
    "distill.config",
)
HEAVY = ("torch", "transformers", "ray", "trl", "datasets", "accelerate", "wandb", "matplotlib")


def floor(module: str) -> tuple[int, int]:
    """Floor and row of a module: those of its longest name in the table."""
    places = {
        name: (height, row)
        for height, rows in enumerate(FLOORS)
        for row, names in enumerate(rows)
        for name in names
        if module == name or module.startswith(f"{name}.")
    }
    assert places, f"{module} stands on no floor: add it to FLOORS"
    return places[max(places, key=len)]


@cache
def modules() -> dict[str, Path]:
    """Every module of the four packages. A package that holds others of several floors, and
    nothing itself, is left out."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted((HOME / package).rglob("*.py")):
            parts = path.relative_to(HOME).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["posttrain"]
    return found


def imports(module: str, path: Path) -> set[str]:
    """What the source of a module imports, functions' bodies included, as full module names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & modules().keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(base)
    return found


def test_every_module_stands_on_a_floor() -> None:
    for module in modules():
        floor(module)


@pytest.mark.parametrize("module", sorted(modules()))
def test_nothing_imports_upward_or_sideways(module: str) -> None:
    height, row = floor(module)
    for other in imports(module, modules()[module]) & modules().keys():
        below, other_row = floor(other)
        assert below < height or (below, other_row) == (height, row), f"{module} imports {other}"


@pytest.mark.parametrize("package", sorted(FREE_OF))
def test_packages_that_stand_alone(package: str) -> None:
    for module, path in modules().items():
        if module == package or module.startswith(f"{package}."):
            tops = {name.partition(".")[0] for name in imports(module, path)}
            tops |= imports(module, path)
            assert not tops & set(FREE_OF[package]), f"{module} imports {tops}"


def test_what_must_start_fast_imports_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        f"    importlib.import_module(name)\n"
        f"    found = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        f"    assert not found, f'import {{name}} brings {{found}}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 0, done.stderr


def test_a_stranger_in_the_place_of_a_sibling_is_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "rewards"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("")
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HOME)!r}]; import posttrain"
    done = subprocess.run([sys.executable, "-c", path], capture_output=True, text=True, cwd="/")
    assert "another package or folder of that name comes first" in done.stderr
