"""JSON schemas: whether arguments fit one, and equality of JSON values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rewards.score import RewardError


def invalid(arguments: object, schema: Mapping[str, Any]) -> str:
    """What does not fit the schema, in one line; empty if everything does.

    Raises:
        RewardError: the schema itself is none.
    """
    from jsonschema.exceptions import best_match

    validator = _validator(json.dumps(schema, sort_keys=True))
    try:
        error = best_match(validator.iter_errors(arguments))
    except RecursionError:
        return "nested too deeply"
    if error is None:
        return ""
    place = ".".join(map(str, error.absolute_path))
    message = error.message if len(error.message) <= 200 else error.message[:200] + "..."
    return f"{place}: {message}" if place else message


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    loaded = json.loads(schema)
    try:
        Draft202012Validator.check_schema(loaded)
    except SchemaError as error:
        raise RewardError(f"a tool's `parameters` are no JSON schema: {error.message}") from error
    return Draft202012Validator(loaded)


def with_defaults(arguments: object, schema: Mapping[str, Any]) -> object:
    """The arguments with the schema's defaults for those left out."""
    if not isinstance(arguments, Mapping):
        return arguments
    properties: Mapping[str, Any] = schema.get("properties") or {}
    defaults = {k: v["default"] for k, v in properties.items() if "default" in v}
    return {**defaults, **arguments}


def same(found: object, wanted: object) -> bool:
    """Equality of JSON values: 5 equals 5.0, but true is not 1."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted
