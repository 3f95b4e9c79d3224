"""A whole conversation in V4's format, taken apart: what encoding.py makes, back. Never raises.

The structure is read from control tokens, and from tags that no text can spell where they are none
(marks.py), so nothing that is said can add a message. Some of
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

from posttrain.chat.encoding import TOOLS_HEAD
from posttrain.chat.marks import (
    CLOSE_RESULT,
    MAX_EFFORT,
    NUMBER,
    OPEN_RESULT,
    show_effort,
    show_tag,
)
from posttrain.chat.turns import ToolCall, clean, text_of, turn_of
from posttrain.config import Effort
from posttrain.tokenizer import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    REMINDER,
    THINK,
    USER,
    controls_of,
)

RESULT = re.compile(f"{OPEN_RESULT}(.*?){CLOSE_RESULT}", re.DOTALL)


@dataclass(slots=True)
class Conversation:
    """`Conversation([{"role": "user", "content": "8+7="}], effort="high")`, which ends with the
    mark to answer after."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    tools: list[Any] = field(default_factory=list[Any])
    effort: Effort = "none"
    whole_calls: dict[int, list[ToolCall]] = field(default_factory=dict[int, list[ToolCall]])
    """`Turn.whole_calls` of the messages, by their index, whose calls are broken."""

    problem: str | None = None
    """The first thing that is wrong with the form; None where all of it was understood."""

    def note(self, problem: str | None) -> None:
        self.problem = self.problem or problem


def parse_conversation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Conversation:
    """What `encode_example` or `encode_prompt` were given, from their ids or a part of them."""
    found = Conversation()
    head, pairs = _turns(tokenizer, ids)
    if not head.startswith(BOS):
        found.note("it does not begin with the first token of a conversation")
    _read_head(found, head.removeprefix(BOS))
    before = ""
    for i, (mark, text) in enumerate(pairs, 1):
        if mark == USER:
            heard = _heard(tokenizer, text)
            if before == USER and [m["role"] for m in heard] == ["user"]:
                heard[0]["role"] = "developer"
            found.messages += heard
        elif mark == REMINDER:
            found.messages.append({"role": "latest_reminder", "content": clean(text)})
        else:
            _read_turn(tokenizer, found, text, is_last=i == len(pairs))
        before = mark
    return found


def parse_tool_results(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What `encode_tool_results` was given, as far as it is whole."""
    heard = [_heard(tokenizer, text) for mark, text in _turns(tokenizer, ids)[1] if mark == USER]
    return [m["content"] for messages in heard for m in messages if m["role"] == "tool"]


def _turns(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first mark of a turn; each such mark and the text behind it."""
    known = controls_of(tokenizer).spelling_to_id
    marks = [mark for mark in (USER, ASSISTANT, REMINDER) if mark in known]
    head, *parts = re.split(f"({'|'.join(marks) or '(?!)'})", text_of(tokenizer, ids))
    return head, list(zip(parts[::2], parts[1::2], strict=True))


def _read_head(found: Conversation, text: str) -> None:
    """The effort's words, the system's, the tools."""
    if text.startswith(MAX_EFFORT):
        found.effort, text = "max", text.removeprefix(MAX_EFFORT)
    elif number := NUMBER.match(text):
        found.effort, text = int(number[1]), text[number.end() :]
    system, opened, schemas = text.partition(TOOLS_HEAD)
    system = system.removesuffix("\n\n") if opened else system
    if system:
        found.messages.append({"role": "system", "content": show_effort(clean(system))})
    for line in schemas.removesuffix("\n").split("\n") if opened else ():
        try:
            found.tools.append(json.loads(clean(line)))
        except (ValueError, RecursionError):
            found.note(f"a tool's schema that is no JSON: {clean(line)[:40]!r}")


def _heard(tokenizer: PreTrainedTokenizerBase, text: str) -> list[dict[str, Any]]:
    """The user's and the tools' messages of one turn, which stand two newlines apart."""
    known = controls_of(tokenizer).spelling_to_id
    messages: list[dict[str, Any]] = []

    def user(said: str | None) -> None:
        if said is not None:
            shown = show_tag(clean(said), OPEN_RESULT, known)
            messages.append({"role": "user", "content": shown})

    at = 0
    for result in RESULT.finditer(text):
        user(_said(text[at : result.start()], is_first=not at, is_last=False))
        messages.append(
            {"role": "tool", "content": show_tag(clean(result[1]), CLOSE_RESULT, known)}
        )
        at = result.end()
    user(_said(text[at:], is_first=not at, is_last=True))
    return messages


def _said(text: str, *, is_first: bool, is_last: bool) -> str | None:
    """The user's message in the text beside results, if there is one."""
    if is_first and is_last:
        return text
    if not text or (not is_first and not is_last and text == "\n\n"):
        return None
    text = text if is_first else text.removeprefix("\n\n")
    return text if is_last else text.removesuffix("\n\n")


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
    if turn.whole_calls:
        found.whole_calls[len(found.messages)] = turn.whole_calls
    found.note(turn.problem and f"message {len(found.messages)}: {turn.problem}")
    found.messages.append(turn.message())
    if rest:
        found.note(f"text after a turn's end: {clean(rest)[:40]!r}")
