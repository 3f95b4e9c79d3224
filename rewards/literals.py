"""Values as Python writes them: read without being evaluated, and compared with their types.

    read("[1, {'a': (2.0, None)}]"), same(read("1"), read("True")) is False

Besides Python's literals: nan, inf, set(), frozenset(...), and OrderedDict, Counter, defaultdict,
deque as the dict or list they hold.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any, cast

MAX_CHARACTERS = 100_000


class NotALiteral(ValueError):
    """The text is not the repr of plain data, or it is too large."""


def read(text: str) -> object:
    """The value; NotALiteral if the text is none."""
    if len(text) > MAX_CHARACTERS:
        raise NotALiteral(f"longer than {MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's escapes; nobody reads them
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise NotALiteral(f"no literal: {type(error).__name__}") from error


_NAMES: Mapping[str, float] = {"nan": math.nan, "inf": math.inf}
_MADE_OF: Mapping[str, Callable[[Any], object]] = {
    "Counter": dict,
    "OrderedDict": dict,
    "deque": list,
    "frozenset": frozenset,
    "set": set,
}


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant() if node.value is not Ellipsis:
            return node.value
        case ast.Tuple():
            return tuple(map(_value, node.elts))
        case ast.List():
            return list(map(_value, node.elts))
        case ast.Set():
            return set(map(_value, node.elts))
        case ast.Dict() if None not in node.keys:
            keys = cast("list[ast.expr]", node.keys)
            return dict(zip(map(_value, keys), map(_value, node.values), strict=True))
        case ast.Name() if node.id in _NAMES:
            return _NAMES[node.id]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
            number = _number(node.operand)
            return -number if isinstance(node.op, ast.USub) else number
        case ast.BinOp(op=ast.Add() | ast.Sub(), right=ast.Constant(value=complex() as imaginary)):
            real = _number(node.left)
            return real + imaginary if isinstance(node.op, ast.Add) else real - imaginary
        case ast.Call(func=ast.Name(id=name)) if not node.keywords:
            return _called(name, node.args)
        case _:
            raise ValueError(type(node).__name__)


def _number(node: ast.expr) -> Any:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, int | float | complex):
        raise TypeError("no number")
    return value


def _called(name: str, arguments: list[ast.expr]) -> object:
    if name == "defaultdict" and len(arguments) == 2:  # its first argument is no literal
        return dict(_value(arguments[1]))
    if name not in _MADE_OF or len(arguments) > 1:
        raise ValueError(name)
    return _MADE_OF[name](_value(arguments[0]) if arguments else ())


def same(found: object, wanted: object, *, tolerance: float = 0.0) -> bool:
    """Equal and of the same types all the way down: True is not 1, [1] is not (1,). Floats may
    differ by `tolerance`, absolutely or in proportion; nan equals nan."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, float) and isinstance(wanted, float):
        close = math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
        return close or (math.isnan(found) and math.isnan(wanted))
    if isinstance(found, list | tuple):
        other = cast("list[Any]", wanted)
        return len(found) == len(other) and all(
            same(a, b, tolerance=tolerance) for a, b in zip(found, other, strict=True)
        )
    if isinstance(found, dict):
        table = cast("dict[Any, Any]", wanted)
        return _same_keys(found, table) and all(
            same(value, table[key], tolerance=tolerance) for key, value in found.items()
        )
    if isinstance(found, Set):
        return _same_keys(found, cast("Set[Any]", wanted))
    return found == wanted


def _same_keys(found: Mapping[Any, Any] | Set[Any], wanted: Mapping[Any, Any] | Set[Any]) -> bool:
    """Equal as sets, each key of the same types; neither side has nan as a key."""
    types = {key: type(key) for key in found}
    return len(found) == len(wanted) and all(
        key in types and types[key] is type(key) for key in wanted
    )
