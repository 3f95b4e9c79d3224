"""Texts cut into words, sentences and paragraphs, and counts that are wrong, in words.

Every pattern runs in linear time, whatever the text.
"""

from __future__ import annotations

import re
import string

STRIPPED = string.punctuation + string.whitespace + "\u2018\u2019\u201c\u201d"


def words(text: str) -> list[str]:
    """Runs of letters and digits."""
    return re.findall(r"\w+", text)


def bare_words(text: str) -> list[str]:
    """What stands between white space, in lower case, without the punctuation around it."""
    return [word for part in text.lower().split() if (word := part.strip(STRIPPED))]


def sentences(text: str) -> list[str]:
    """Cut after an end mark (with what closes behind it) that white space follows."""
    ends = re.split(r"(?<=[.!?])[\"')\]]?\s+", text.strip())
    return [part for part in ends if part]


def paragraphs(text: str, mark: str = "***") -> list[str]:
    """What stands between the marks, empty parts too."""
    return [part.strip() for part in text.split(mark)]


def miscount(what: str, found: int, wanted: int, relation: str = "exactly") -> str:
    """What is wrong with a count; empty if nothing is. TypeError for an unknown relation."""
    holds = {
        "at least": found >= wanted,
        "at most": found <= wanted,
        "less than": found < wanted,
        "exactly": found == wanted,
    }
    if relation not in holds:
        raise TypeError(f"relation {relation!r} is none of {', '.join(holds)}")
    return "" if holds[relation] else f"{found} {what}, needed {relation} {wanted}"
