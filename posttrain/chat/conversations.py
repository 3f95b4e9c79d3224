"""A whole conversation in V4's format, taken apart: what encoding.py makes, back. Never raises.

The structure is read from control tokens alone, so nothing that is said can add a message. Some of
what was put in is not in the ids: a developer has the user's mark, so of turns that follow each
other the first is the user's and the others a developer's; messages of one role that were joined
are one; what V4 leaves out (encoding.py) is not there. Encoding what comes back gives the same ids.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.chat.encoding import MAX_EFFORT, NUMBER_EFFORT, TOOLS_HEAD
from posttrain.chat.turns import clean, text_of, turn_of
from posttrain.config import Effort
from posttrain.tokenizer import ASSISTANT, BOS, END_THINK, EOS, REMINDER, THINK, USER

MARKS = re.compile(f"({USER}|{ASSISTANT}|{REMINDER})")
RESULT = re.compile("<tool_result>(.*?)</tool_result>", re.DOTALL)
NUMBER = re.compile(re.escape(NUMBER_EFFORT).replace(r"\{number\}", r"(\d{1,3})"))


@dataclass(slots=True)
class Conversation:
    """`Conversation([{"role": "user", "content": "8+7="}], effort="high")`, which ends with the
    mark to answer after."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tools: list[Any] = field(default_factory=list[Any])
    effort: Effort = "none"
    problem: str | None = None
    """The first thing that is wrong with the form; None where all of it was understood."""

    def note(self, problem: str | None) -> None:
        self.problem = self.problem or problem


def parse_conversation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Conversation:
    """What `encode_example` or `encode_prompt` were given, from their ids or a part of them.

    Where the tokenizer has no token for it, as V4's own vocabulary has none, a tool's result ends
    at the first `</tool_result>` in its text.
    """
    found = Conversation()
    head, *parts = MARKS.split(text_of(tokenizer, ids))
    if not head.startswith(BOS):
        found.note("it does not begin with the first token of a conversation")
    _read_head(found, head.removeprefix(BOS))
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    before = ""
    for i, (mark, text) in enumerate(pairs, 1):
        if mark == USER:
            heard = _heard(text)
            if before == USER and [m["role"] for m in heard] == ["user"]:
                heard[0]["role"] = "developer"
            found.messages += heard
        elif mark == REMINDER:
            found.messages.append({"role": "latest_reminder", "content": clean(text)})
        else:
            _read_turn(tokenizer, found, text, is_last=i == len(pairs))
        before = mark
    return found


def _read_head(found: Conversation, text: str) -> None:
    """The effort's words, the system's, the tools."""
    if text.startswith(MAX_EFFORT):
        found.effort, text = "max", text.removeprefix(MAX_EFFORT)
    elif number := NUMBER.match(text):
        found.effort, text = int(number[1]), text[number.end() :]
    system, opened, schemas = text.partition(TOOLS_HEAD)
    system = system.removesuffix("\n\n") if opened else system
    if system:
        found.messages.append({"role": "system", "content": clean(system)})
    for line in schemas.removesuffix("\n").split("\n") if opened else ():
        try:
            found.tools.append(json.loads(clean(line)))
        except (ValueError, RecursionError):
            found.note(f"a tool's schema that is no JSON: {clean(line)[:40]!r}")


def _heard(text: str) -> list[dict[str, Any]]:
    """The user's and the tools' messages of one turn, which stand two newlines apart."""
    messages: list[dict[str, Any]] = []
    at = 0
    for result in RESULT.finditer(text):
        messages += _said(text[at : result.start()], is_first=not at, is_last=False)
        messages.append({"role": "tool", "content": clean(result[1])})
        at = result.end()
    return messages + _said(text[at:], is_first=not at, is_last=True)


def _said(text: str, *, is_first: bool, is_last: bool) -> list[dict[str, Any]]:
    """The user's message in the text beside results, if there is one."""
    if is_first and is_last:
        return [{"role": "user", "content": clean(text)}]
    if not text or (not is_first and not is_last and text == "\n\n"):
        return []
    text = text if is_first else text.removeprefix("\n\n")
    return [{"role": "user", "content": clean(text if is_last else text.removesuffix("\n\n"))}]


def _read_turn(
    tokenizer: PreTrainedTokenizerBase, found: Conversation, text: str, *, is_last: bool
) -> None:
    """The assistant's, or the mark to answer after."""
    is_thinking = text.startswith(THINK)
    if is_thinking and found.effort == "none":
        found.effort = "high"
    if not text.startswith((THINK, END_THINK)):
        found.note("an assistant's turn that does not tell whether it thinks")
    text = text.removeprefix(THINK if is_thinking else END_THINK)
    if is_last and not text:
        return
    body, ended, rest = text.partition(EOS)
    turn = turn_of(tokenizer, body, is_ended=bool(ended), is_thinking=is_thinking)
    found.messages.append(turn.message())
    found.note(turn.problem)
    if rest:
        found.note(f"text after a turn's end: {clean(rest)[:40]!r}")
