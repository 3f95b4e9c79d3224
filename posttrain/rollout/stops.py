"""Stop strings, in the text of a turn's last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BYTES_PER_CHARACTER = 4
"""UTF-8's most; a token may be a single byte."""

SPARE = 8
"""Tokens more than a stop string can take: special tokens that leave no text."""


class Stops:
    """The stop strings of a request."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        """Raises ValueError: an empty stop string, or stop strings without a tokenizer."""
        if strings and tokenizer is None:
            raise ValueError(
                f"the request has stop strings {list(strings)}: give the engine the tokenizer "
                "that turns tokens into text, Engine(..., tokenizer=...)"
            )
        if "" in strings:
            raise ValueError("a stop string is empty: every text would end at once")
        self._strings, self._tokenizer = strings, tokenizer
        longest = max((len(s) for s in strings), default=0)
        self._num_tokens = BYTES_PER_CHARACTER * longest + SPARE

    def completed(self, response: Sequence[int], turn: int) -> str:
        """The first stop string in the text of the turn, which begins at `turn`; "" for none.

        Asked after every token, so it ends in the last one, and a tail of tokens tells: of its
        text too, for a character that begins before the tail is no part of a string in it."""
        if not self._strings:
            return ""
        tail = list(response[max(turn, len(response) - self._num_tokens) :])
        text = str(self._tokenizer.decode(tail, clean_up_tokenization_spaces=False))
        found = [(text.find(s), s) for s in self._strings if s in text]
        return min(found)[1] if found else ""
