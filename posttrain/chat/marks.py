"""Marks of V4's format that are mere characters: how a text that spells one is told from it.

V4's vocabulary has no token for the tags of a tool's result and none for the effort's words. Where
a text would be taken for one, it is written with a backslash more, and read with one fewer.
"""

import re
from collections.abc import Collection

OPEN_RESULT = "<tool_result>"
CLOSE_RESULT = "</tool_result>"

MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
"""What V4 reads in front of the system text at effort `max`: part of the format, word for word."""

NUMBER_EFFORT = "Reasoning Effort: {number} of 100.\n\n"
"""What stands there at an effort that is a number: our words, V4's encoder has none for it."""

NUMBER = re.compile(re.escape(NUMBER_EFFORT).replace(r"\{number\}", "(100|[1-9][0-9]?)"))
EFFORT = re.compile(rf"(\\*)(?:{re.escape(MAX_EFFORT)}|{NUMBER.pattern})")


def hide_effort(system: str) -> str:
    r"""`\Reasoning Effort: ...` of a system text that begins with an effort's words."""
    return "\\" + system if EFFORT.match(system) else system


def show_effort(system: str) -> str:
    """The inverse of `hide_effort`."""
    found = EFFORT.match(system)
    return system[1:] if found and found[1] else system


def hide_tag(text: str, tag: str, spellings: Collection[str]) -> str:
    r"""`<\/tool_result>` for `</tool_result>`, and so for one with backslashes, where `spellings`,
    the tokenizer's control tokens, lack it."""
    return text if not tag or tag in spellings else _spelled(tag, r"\\*").sub(_more, text)


def show_tag(text: str, tag: str, spellings: Collection[str]) -> str:
    """The inverse of `hide_tag`."""
    return text if tag in spellings else _spelled(tag, r"\\+").sub(_fewer, text)


def _spelled(tag: str, backslashes: str) -> re.Pattern[str]:
    return re.compile(f"<{backslashes}{re.escape(tag[1:])}")


def _more(found: re.Match[str]) -> str:
    return f"<\\{found[0][1:]}"


def _fewer(found: re.Match[str]) -> str:
    return f"<{found[0][2:]}"
