"""From a reward's name, or a user's `module:function`, to the function."""

from __future__ import annotations

import ast
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import cast

from rewards.score import Reward, RewardError

REWARDS: dict[str, str] = {
    "exact": "rewards.puzzles:score",
    "formats": "rewards.formats:score",
    "instructions": "rewards.instructions:score",
    "mathematics": "rewards.mathematics:score",
    "programs": "rewards.programs:score",
    "puzzles": "rewards.puzzles:score",
    "tools": "rewards.tools:score",
    "verdicts": "rewards.verdicts:score",
}
"""The rewards that have a name, each with the place of its function."""


def load_reward(name_or_path: str, folder: Path | None = None) -> Reward:
    """The reward called so; a user's module is looked for in `folder` first. RewardError if it
    is not there or its import fails."""
    known_reward(name_or_path, folder)
    module_name, function_name = _split(name_or_path)
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward {name_or_path!r}: `import {module_name}` raised {type(error).__name__}: "
            f"{error}; mend the module or install what it needs"
        ) from error
    if not callable(found):
        raise RewardError(
            f"reward {name_or_path!r}: {function_name!r} is {type(found).__name__}, not a function"
        )
    return cast("Reward", found)


def known_reward(name_or_path: str, folder: Path | None = None) -> None:
    """RewardError unless the reward exists. Reads a user's module but never runs it, so that a
    recipe's checks stay fast whatever that module imports."""
    module_name, function_name = _split(name_or_path)
    places = [str(folder.resolve())] if folder is not None else []
    _refuse_shadowed(module_name, name_or_path, folder)
    spec = _find(module_name, [*places, *sys.path])
    if spec is None:
        raise RewardError(
            f"reward {name_or_path!r}: no module {module_name!r} in {folder or 'sys.path'}; put "
            f"{module_name.replace('.', '/')}.py there, or use one of {_names()}"
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled: only an import can tell
    defined = _top_level_names(Path(spec.origin), name_or_path)
    if function_name not in defined and "*" not in defined:
        functions = ", ".join(sorted(n for n in defined if not n.startswith("_"))) or "nothing"
        raise RewardError(
            f"reward {name_or_path!r}: {spec.origin} defines no {function_name!r} (it has "
            f"{functions[:200]}); correct the name after the colon"
        )


def _names() -> str:
    return ", ".join(REWARDS)


def _split(name_or_path: str) -> tuple[str, str]:
    path = REWARDS.get(name_or_path, name_or_path)
    module_name, colon, function_name = path.partition(":")
    parts = [*module_name.split("."), function_name]
    if not colon or not all(part.isidentifier() for part in parts):
        raise RewardError(
            f"unknown reward {name_or_path!r}: use one of {_names()}, or `module:function` of "
            "your own"
        )
    return module_name, function_name


def _refuse_shadowed(module_name: str, name_or_path: str, folder: Path | None) -> None:
    """The grading process has these modules loaded before it looks into the user's folder."""
    top = module_name.partition(".")[0]
    if folder is None or top not in {*sys.stdlib_module_names, "rewards"}:
        return
    if (folder / f"{top}.py").exists() or (folder / top / "__init__.py").exists():
        raise RewardError(
            f"reward {name_or_path!r}: {folder / top} has the name of another module, {top!r}, "
            f"which comes first; rename it, for example to my_{top}"
        )


def _find(module_name: str, path: list[str]) -> ModuleSpec | None:
    """The module's spec without importing its parents (importlib.util.find_spec would)."""
    spec: ModuleSpec | None = None
    search: list[str] | None = path
    name = ""
    for part in module_name.split("."):
        if search is None:
            return None
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, search)
        if spec is None:
            return None
        search = None
        if spec.submodule_search_locations is not None:
            search = list(spec.submodule_search_locations)
    return spec


def _top_level_names(source: Path, name_or_path: str) -> set[str]:
    """What the file binds at its top level, also under `if` and `try`; "*" for a star import."""
    try:
        tree = ast.parse(source.read_bytes(), filename=str(source))
    except (SyntaxError, ValueError) as error:
        raise RewardError(f"reward {name_or_path!r}: {source} is no Python: {error}") from error
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif not isinstance(node, ast.expr) or isinstance(node, ast.Tuple | ast.List):
            pending.extend(ast.iter_child_nodes(node))
    return names
