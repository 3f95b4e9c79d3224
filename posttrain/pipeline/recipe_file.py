"""A recipe from a name or a path: found, read, overridden and validated, with one-line errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posttrain.errors import RecipeError
from posttrain.pipeline.recipe import FieldError, Recipe
from posttrain.pipeline.recipe_fields import child, known_fields, with_override
from posttrain.pipeline.recipe_yaml import FieldPath, Source, read_source, split_field
from posttrain.pipeline.shipped import find_recipe
from posttrain.pipeline.words import closest, shown


@dataclass(frozen=True)
class RecipeFile:
    """A checked recipe and where it came from."""

    recipe: Recipe
    path: Path
    """Absolute."""
    source: Source

    @property
    def folder(self) -> Path:
        """What the recipe's paths are relative to."""
        return self.path.parent

    @property
    def directory(self) -> Path:
        """The run's folder unless another is asked for."""
        return Path("runs") / self.recipe.name


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read, override and validate. Raises RecipeError with one line; touches nothing else."""
    path = find_recipe(name_or_path)
    source = read_source(path)
    for override in overrides:
        source = with_override(source, override)
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise first_error(error, source) from None
    return RecipeFile(recipe, path, source)


REMEDIES = {
    "missing": "a required field is missing: add it (see `posttrain schema`)",
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "string_type": "a text is needed; quote it if it looks like a number",
    "list_type": "a list is needed",
    "dict_type": "a mapping of names to values is needed",
    "too_short": "at least one is needed",
    "model_type": "a mapping of fields is needed (see `posttrain schema`)",
}
"""What to do about pydantic's commonest errors."""


def first_error(error: ValidationError, source: Source) -> RecipeError:
    """The error that stands first in the file, as one line with the value and the remedy."""
    details = [(_where(d, source.data), d) for d in error.errors(include_url=False)]
    details.sort(key=lambda pair: (source.line(pair[0]) or 0, -len(pair[0])))
    where, detail = details[0]
    known = known_fields(where[:-1], source.data)
    if detail["type"] == "extra_forbidden":
        name = where[-1]
        hint = closest(name, known).lstrip("; ") or f"the fields here are {', '.join(known)}"
        message = f"there is no such field (its value is {shown(detail['input'])}); {hint}"
    elif detail["type"] == "value_error":
        cause = detail.get("ctx", {}).get("error")
        message = str(cause or detail["msg"])
        where = split_field(cause.field) if isinstance(cause, FieldError) else where
    elif detail["type"] == "missing":
        message = REMEDIES["missing"]
    else:
        # a field that may be of several types has an error for each
        remedies = [_remedy(other) for place, other in details if place == where]
        message = f"found {shown(detail['input'])}, but {', or '.join(dict.fromkeys(remedies))}"
    others = len({w for w, _ in details if w != where[: len(w)]})
    return source.error(where, message + (f" (and {others} more to mend)" if others else ""))


def _remedy(detail: ErrorDetails) -> str:
    return REMEDIES.get(detail["type"], detail["msg"][:1].lower() + detail["msg"][1:])


def _where(detail: ErrorDetails, data: Any) -> FieldPath:
    """pydantic's location without the tags it adds for unions and validators."""
    found: list[str | int] = []
    loc = detail["loc"]
    for i, item in enumerate(loc):
        inside = isinstance(data, dict) and item in data
        inside = inside or (isinstance(data, list) and isinstance(item, int))
        if inside:
            found.append(str(item) if isinstance(data, dict) else item)
            data = child(data, item)
        elif i == len(loc) - 1 and detail["type"] == "missing":
            found.append(item)
    return tuple(found)
