"""A hash of what decides a source's rows, for the keys of the stages that read them."""

import ast
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain.domains.config import DataConfig, SourceConfig
from posttrain.errors import DataError

HOME = Path(__file__).resolve().parents[2]

LIBRARIES = {"hub": "datasets", "reasoning_gym": "reasoning-gym"}


def fingerprint(data: DataConfig, folder: Path) -> str:
    """sha256 of the settings and of what they name: the file, the function's source, a version.

    A hub data set is taken by its name: its rows are not fetched to be hashed.

    Raises:
        DataError: if the file is not there.
    """
    total = hashlib.sha256(data.model_dump_json().encode())
    for part in data.parts:
        _add(total, part, folder)
    return total.hexdigest()


def _add(total: Any, data: SourceConfig, folder: Path) -> None:
    """What one source names."""
    if file_name := data.jsonl or data.parquet:
        path = folder / file_name
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; paths are relative to the recipe")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    for function in filter(None, (data.python, data.convert)):
        for name, path in sorted(sources(function.partition(":")[0], folder).items()):
            total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    for source, library in LIBRARIES.items():
        if getattr(data, source) is not None:
            total.update(_version(library).encode())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


def sources(module: str, folder: Path) -> dict[str, Path]:
    """The files of the module and of all it imports, as far as they are the user's or ours."""
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _file(name, folder)
        if path is not None and name not in found:
            found[name] = path
            todo += _imports(name, path)
    return found


def _file(module: str, folder: Path) -> Path | None:
    for root in (folder, HOME):
        path = root.joinpath(*module.split("."))
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


def _imports(module: str, path: Path) -> list[str]:
    """Names that the source imports; some may be functions, which have no file."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return []
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name]
