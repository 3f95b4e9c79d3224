"""The code version of a stage: a hash of every source file that its work can run.

The files are found by reading, not by importing: from the work's module on, all imports (also those
inside functions) and all string constants that name one of our modules (`"distill.teachers:Pool"`),
as far as they lead to files of our four packages or of the recipe's folder. The reward table names
every reward, so its strings are left out: a domain's own rewards are hashed with the domain.

Not seen: files that a user's module opens itself, and libraries it imports beyond LIBRARIES. Who
changes those deletes the stages' folders.
"""

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from posttrain import SIBLINGS

HOME = Path(__file__).resolve().parents[2]

EXCLUDED = ("posttrain.pipeline", "posttrain.cli")
"""What decides when a stage runs, never what it computes."""

REWARD_TABLE = "rewards.registry"

LIBRARIES = (
    *("torch", "transformers", "trl", "accelerate", "tokenizers", "peft", "datasets"),
    *("math-verify", "py3langid", "reasoning-gym"),
)

MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:\w+)?")


@cache
def versions() -> dict[str, str]:
    """Versions of what decides results: Python's major and minor, and the libraries installed."""
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_version(modules: Iterable[str], folder: Path | None = None) -> str:
    """sha256 over the sources that `modules` lead to; `folder` holds the user's own modules."""
    total = hashlib.sha256()
    for name, path in sorted(closure(modules, folder).items()):
        total.update(f"{name}\0{_digest(path)}\n".encode())
    return total.hexdigest()


def closure(modules: Iterable[str], folder: Path | None = None) -> dict[str, Path]:
    """Every module of ours (or of the recipe's folder) that `modules` lead to, and its file."""
    found: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        path = find(name, folder)
        if name in found or path is None:
            continue
        found[name] = path
        todo += _parents(name)
        todo += imported(name, path)
    return found


def find(module: str, folder: Path | None = None) -> Path | None:
    """The file of one of our modules, or of one in `folder`; None for any other."""
    if any(module == top or module.startswith(f"{top}.") for top in EXCLUDED):
        return None
    root = HOME if module.split(".")[0] in SIBLINGS else folder
    return None if root is None else _file(root, module)


@cache
def imported(module: str, path: Path) -> tuple[str, ...]:
    """Names that the source in `path` imports or spells out; some may be no modules."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        names.update(dict.fromkeys(_names(node, module, package)))
    return tuple(names)


def _names(node: ast.AST, module: str, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and module != REWARD_TABLE:
        value = node.value
        if isinstance(value, str) and MODULE_NAME.fullmatch(value):
            yield value.partition(":")[0]


def _parents(module: str) -> Iterator[str]:
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


@cache
def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    for candidate in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if candidate.is_file():
            return candidate
    return None


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
