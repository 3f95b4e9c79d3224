"""A small language for one-line answers: Python expressions in the variable `x`, read as a syntax
tree and evaluated by walking it. Nothing is compiled, no attribute is looked up by name, and every
value has a size limit that is checked before the value is made.

    evaluate(parse("x[::-1].upper()"), x="abc") == "CBA"

Values are str, int, float, bool, None, and lists and tuples of those. Work is counted: each node
costs one unit plus the size of its result, and an evaluation that spends MAX_WORK ends.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from rewards.expression_library import (
    BINARY,
    COMPARE,
    FUNCTIONS,
    KEYS,
    METHODS,
    UNARY,
    TooLarge,
    iterable,
    size_of,
)

MAX_CHARACTERS = 500
MAX_NODES = 200
MAX_DEPTH = 30
MAX_WORK = 200_000


class ExpressionError(ValueError):
    """The text is no expression of this language, or it fails or grows too large on this `x`."""


def parse(source: str) -> ast.expr:
    """The syntax tree of one expression, within the size limits; the names in it are unchecked."""
    if len(source) > MAX_CHARACTERS:
        raise ExpressionError(f"longer than {MAX_CHARACTERS} characters")
    if "\n" in source or "\r" in source:
        raise ExpressionError("more than one line")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's escapes; nobody reads them
            tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"not Python: {type(error).__name__}") from error
    _check_shape(tree)
    return tree


def evaluate(tree: ast.expr, **names: object) -> object:
    """The value of the expression where these names have values, mostly `x` alone; ExpressionError
    where it has none."""
    try:
        return _Evaluation().value(tree, names)
    except TooLarge as error:
        raise ExpressionError(str(error)) from error
    except ExpressionError:
        raise
    except Exception as error:  # whatever Python's own operations raise on values they cannot take
        raise ExpressionError(f"raises {type(error).__name__}") from error


def _check_shape(tree: ast.expr) -> None:
    level: list[ast.AST] = [tree]
    num_nodes = depth = 0
    while level:
        depth += 1
        num_nodes += len(level)
        if num_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_NODES} parts, or nested deeper than {MAX_DEPTH}")
        level = [child for node in level for child in ast.iter_child_nodes(node)]


Names = Mapping[str, object]


class _Evaluation:
    """One walk over a tree, with its budget of work."""

    def __init__(self) -> None:
        self._work = 0

    def value(self, node: ast.expr, names: Names) -> Any:
        rule = self.RULES.get(type(node))
        if rule is None:
            raise ExpressionError(f"{type(node).__name__} is not allowed")
        result = rule(self, node, names)
        self._spend(1 + size_of(result))
        return result

    def _constant(self, node: ast.Constant, names: Names) -> object:
        if node.value is not None and not isinstance(node.value, str | int | float):
            raise ExpressionError(f"a {type(node.value).__name__} literal is not allowed")
        return node.value

    def _name(self, node: ast.Name, names: Names) -> object:
        if node.id not in names:
            raise ExpressionError(f"the name {node.id!r} is not allowed")
        return names[node.id]

    def _list(self, node: ast.List, names: Names) -> list[object]:
        return [self.value(element, names) for element in node.elts]

    def _tuple(self, node: ast.Tuple, names: Names) -> tuple[object, ...]:
        return tuple(self.value(element, names) for element in node.elts)

    def _subscript(self, node: ast.Subscript, names: Names) -> object:
        whole = self.value(node.value, names)
        if not isinstance(node.slice, ast.Slice):
            return whole[self.value(node.slice, names)]
        ends = (node.slice.lower, node.slice.upper, node.slice.step)
        return whole[slice(*(None if end is None else self.value(end, names) for end in ends))]

    def _unary(self, node: ast.UnaryOp, names: Names) -> object:
        return UNARY[type(node.op)](self.value(node.operand, names))

    def _binary(self, node: ast.BinOp, names: Names) -> object:
        rule = BINARY.get(type(node.op))
        if rule is None:
            raise ExpressionError(f"the operator {type(node.op).__name__} is not allowed")
        return rule(self.value(node.left, names), self.value(node.right, names))

    def _boolean(self, node: ast.BoolOp, names: Names) -> object:
        stops_at = isinstance(node.op, ast.Or)
        result: object = None
        for operand in node.values:
            result = self.value(operand, names)
            if bool(result) is stops_at:
                break
        return result

    def _compare(self, node: ast.Compare, names: Names) -> bool:
        left = self.value(node.left, names)
        for op, operand in zip(node.ops, node.comparators, strict=True):
            right = self.value(operand, names)
            rule = COMPARE.get(type(op))
            if rule is None:
                raise ExpressionError(f"the comparison {type(op).__name__} is not allowed")
            if not rule(left, right):
                return False
            left = right
        return True

    def _if(self, node: ast.IfExp, names: Names) -> object:
        return self.value(node.body if self.value(node.test, names) else node.orelse, names)

    def _call(self, node: ast.Call, names: Names) -> object:
        if isinstance(node.func, ast.Attribute):
            if node.keywords:
                raise ExpressionError(f"keyword arguments of .{node.func.attr}() are not allowed")
            owner = self.value(node.func.value, names)
            method = METHODS.get((type(owner).__name__, node.func.attr))
            if method is None:
                place = f"{type(owner).__name__}.{node.func.attr}()"
                raise ExpressionError(f"the method {place} is not allowed")
            return method(owner, *(self.value(argument, names) for argument in node.args))
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            raise ExpressionError(f"calling {ast.unparse(node.func)[:40]} is not allowed")
        arguments = [self.value(argument, names) for argument in node.args]
        options = dict(self._option(keyword, names) for keyword in node.keywords)
        return FUNCTIONS[node.func.id](*arguments, **options)

    def _option(self, keyword: ast.keyword, names: Names) -> tuple[str, object]:
        if keyword.arg == "reverse":
            return "reverse", self.value(keyword.value, names)
        if keyword.arg == "key" and isinstance(keyword.value, ast.Name):
            key = KEYS.get(keyword.value.id)
            if key is not None:
                return "key", key
        raise ExpressionError(f"the keyword argument {keyword.arg!r} so used is not allowed")

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp, names: Names) -> list[object]:
        bound: list[Names] = [names]
        for loop in node.generators:
            bound = [inner for outer in bound for inner in self._turns(loop, outer)]
        return [self.value(node.elt, names) for names in bound]

    def _turns(self, loop: ast.comprehension, names: Names) -> list[Names]:
        """The names that each turn of one `for ... in ... if ...` sees."""
        items = iterable(self.value(loop.iter, names))
        turns = [{**names, **self._bind(loop.target, item)} for item in items]
        return [turn for turn in turns if all(self.value(test, turn) for test in loop.ifs)]

    def _bind(self, target: ast.expr, item: Any) -> dict[str, object]:
        self._spend(1)
        if isinstance(target, ast.Name):
            return {target.id: item}
        if isinstance(target, ast.Tuple) and len(target.elts) == len(iterable(item)):
            pairs = zip(target.elts, item, strict=True)
            return {name: value for t, i in pairs for name, value in self._bind(t, i).items()}
        raise ExpressionError("this loop target is not allowed")

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise ExpressionError(f"takes more than {MAX_WORK} units of work")

    RULES: Mapping[type[ast.expr], Callable[[Any, Any, Names], object]] = {
        ast.BinOp: _binary,
        ast.BoolOp: _boolean,
        ast.Call: _call,
        ast.Compare: _compare,
        ast.Constant: _constant,
        ast.GeneratorExp: _comprehension,
        ast.IfExp: _if,
        ast.List: _list,
        ast.ListComp: _comprehension,
        ast.Name: _name,
        ast.Subscript: _subscript,
        ast.Tuple: _tuple,
        ast.UnaryOp: _unary,
    }
