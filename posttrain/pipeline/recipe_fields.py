"""The recipe's fields by dotted path: which exist, and how `--set` changes one."""

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel

from posttrain.errors import RecipeError
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.recipe_yaml import FieldPath, Source, dotted, read_value, split_field
from posttrain.pipeline.words import closest


def with_override(source: Source, override: str) -> Source:
    """The source with `a.b=c` set, the value read as YAML. Raises RecipeError on unknown paths."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {override}: write it as field=value, such as --set seed=1")
    where = split_field(name.strip())
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise RecipeError(f"--set {override}: the value is no YAML: {why}") from None
    check_field_exists(where, source.data, override)
    data = _set(source.data, where, value)
    kept = {k: v for k, v in source.lines.items() if k[: len(where)] != where}
    return Source(source.path, data, {**kept, where: 0})


def _set(data: Any, where: FieldPath, value: Any) -> Any:
    """A copy of `data` with the value at `where`; mappings that are missing are made."""
    if not where:
        return value
    name, rest = where[0], where[1:]
    changed = _set(child(data, name), rest, value)
    if isinstance(data, list) and isinstance(name, int):
        items = cast("list[Any]", data)
        return [*items[:name], changed, *items[name + 1 :]]
    return {**(cast("dict[Any, Any]", data) if isinstance(data, dict) else {}), name: changed}


def check_field_exists(where: FieldPath, data: Any, override: str) -> None:
    """Raise RecipeError unless the recipe has such a field; its close matches are named."""
    kinds: list[Any] = [Recipe]
    for depth, name in enumerate(where):
        known, free = _fields(kinds, data)
        if depth == len(where) - 1 and not free:
            free = _entries(kinds)  # a whole new one, such as domains.chemistry={...}
        if str(name) not in known and not free:
            hint = closest(name, known) or f"; known here: {', '.join(known) or 'nothing'}"
            raise RecipeError(
                f"--set {override}: there is no field {dotted(where[: depth + 1])}{hint}"
            )
        kinds = [*known.get(str(name), []), *free]
        data = child(data, name)


def child(data: Any, name: str | int) -> Any:
    """What lies under a key or an index, or None."""
    if isinstance(data, dict):
        return cast("dict[Any, Any]", data).get(name)
    if isinstance(data, list) and isinstance(name, int):
        items = cast("list[Any]", data)
        return items[name] if name < len(items) else None
    return None


def _fields(kinds: list[Any], data: Any) -> tuple[dict[str, list[Any]], list[Any]]:
    """What may follow a field of these types: named children, and the types of free-named ones."""
    known: dict[str, list[Any]] = {}
    free: list[Any] = []
    for kind in _alternatives(kinds):
        origin, args = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            known |= {name: [info.annotation] for name, info in kind.model_fields.items()}
        elif origin in (dict, Mapping) and _has_models(args[1]):
            entries = cast("dict[Any, Any]", data) if isinstance(data, dict) else {}
            known |= {str(key): [args[1]] for key in entries}
        elif origin in (dict, Mapping):
            free.append(args[1])
        elif origin is list:
            items = cast("list[Any]", data) if isinstance(data, list) else []
            known |= {str(i): [args[0]] for i in range(len(items))}
        elif kind in (Any, dict):
            free.append(Any)
    return known, free


def _entries(kinds: list[Any]) -> list[Any]:
    """The types of what stands under freely chosen names, such as a domain."""
    origins = [(get_origin(kind), get_args(kind)) for kind in _alternatives(kinds)]
    return [args[1] for origin, args in origins if origin in (dict, Mapping)]


def _alternatives(kinds: Iterable[Any]) -> Iterable[Any]:
    for kind in kinds:
        if get_origin(kind) in (Union, types.UnionType):
            yield from _alternatives(get_args(kind))
        elif get_origin(kind) is Annotated:
            yield from _alternatives(get_args(kind)[:1])
        else:
            yield kind


def _has_models(kind: Any) -> bool:
    return any(isinstance(k, type) and issubclass(k, BaseModel) for k in _alternatives([kind]))


def known_fields(where: FieldPath, data: Any) -> list[str]:
    """The names that may stand at this place."""
    kinds: list[Any] = [Recipe]
    for name in where:
        known, free = _fields(kinds, data)
        kinds = [*known.get(str(name), []), *free]
        data = child(data, name)
    return list(_fields(kinds, data)[0])
