"""Which language a text is in, by py3langid: 139 languages, offline, no clock and no chance."""

from __future__ import annotations

from functools import cache
from typing import Any

MAX_CHARACTERS = 20_000
"""Of a text that are looked at."""


def language_of(text: str) -> str:
    """The ISO 639-1 code of the text's language, such as "en"; a guess where the text is short."""
    return _identifier().classify(text[:MAX_CHARACTERS])[0]


def prepare() -> None:
    """Load the model (a second or more) before the clock of the first text starts."""
    _identifier()


@cache
def _identifier() -> Any:
    from py3langid import langid

    langid.classify("")  # loads the model
    return langid
