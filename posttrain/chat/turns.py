"""A turn that a model wrote, taken apart: reasoning, content, tool calls. Never raises.

The structure is read from control tokens alone: a tag that the model spelled in other tokens is
content, as it is when a user writes it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config import Effort
from posttrain.tokenizer import DSML, END_THINK, controls_of

CUT = "\ufdd0"
"""Stands inside what is no control token though spelled like one, until the turn is taken apart."""

INVOKE = re.compile(f'<{DSML}invoke name="([^"]*)">\n?')
PARAMETER = re.compile(
    f'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>\n?', re.DOTALL
)
OPEN_CALLS = f"<{DSML}tool_calls>"
END_INVOKE = re.compile(f"\n?</{DSML}invoke>\n?")
END_CALLS = re.compile(f"</{DSML}tool_calls>")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`ToolCall("get", {"key": "qfz"})`."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """`Turn("8+7=15;...", "85")`, or `Turn("", "", [ToolCall("get", {"key": "qfz"})])`."""

    reasoning: str
    content: str
    tool_calls: list[ToolCall] = field(default_factory=list[ToolCall])
    problem: str | None = None
    """What is wrong with the turn's form; None where it is whole and ended."""

    def message(self) -> dict[str, Any]:
        """The turn as an assistant message."""
        calls = [{"name": call.name, "arguments": call.arguments} for call in self.tool_calls]
        return {
            "role": "assistant",
            "content": self.content,
            **({"reasoning": self.reasoning} if self.reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
        }


class _Malformed(ValueError):
    """Calls that cannot be read."""


def parse_turn(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, effort: Effort = "none"
) -> Turn:
    """The turn of the model's own `ids` (its EOS included, if it was sampled)."""
    is_ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = text_of(tokenizer, ids[:-1] if is_ended else ids)
    return turn_of(tokenizer, text, is_ended=is_ended, is_thinking=effort != "none")


def turn_of(
    tokenizer: PreTrainedTokenizerBase, text: str, *, is_ended: bool, is_thinking: bool
) -> Turn:
    """The turn of what `text_of` gives of its ids, without its EOS."""
    problem = None if is_ended else "the turn has no end"
    reasoning = ""
    if is_thinking:
        reasoning, mark, text = text.partition(END_THINK)
        problem = problem if mark else "the reasoning has no end"
    content, opened, block = text.partition(OPEN_CALLS)
    calls: list[ToolCall] = []
    if opened:
        content = content.removesuffix("\n\n")
        try:
            calls = _calls(block)
        except _Malformed as error:
            content, problem = text, str(error)
    if not problem and controls_of(tokenizer).pattern.search(reasoning + CUT + content):
        problem = "a control token inside the text"
    return Turn(clean(reasoning), clean(content), calls, problem)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids' text; what only looks like a control token in it is cut."""
    controls = controls_of(tokenizer)
    parts: list[str] = []
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in controls.ids:
            run.append(token)
            continue
        if run:
            text = str(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            parts.append(CUT.join(controls.cut(text)))
            run = []
        if token is not None:
            parts.append(controls.id_to_spelling[token])
    return "".join(parts)


def clean(text: str) -> str:
    """What was written, of a part of `text_of`."""
    return text.replace(CUT, "")


def _calls(block: str) -> list[ToolCall]:
    """The calls of a block, which must be whole. Raises _Malformed."""
    calls: list[ToolCall] = []
    at = len(block) - len(block.lstrip("\n"))
    while invoke := INVOKE.match(block, at):
        at = invoke.end()
        arguments: dict[str, Any] = {}
        while parameter := PARAMETER.match(block, at):
            at = parameter.end()
            key, is_string, value = parameter.groups()
            arguments[clean(key)] = clean(value) if is_string == "true" else _json(clean(value))
        end = END_INVOKE.match(block, at)
        if not end:
            raise _Malformed(f"a call of {clean(invoke[1])!r} that cannot be read")
        at = end.end()
        calls.append(ToolCall(clean(invoke[1]), arguments))
    close = END_CALLS.match(block, at)
    if not close or not calls:
        raise _Malformed("a tool call that cannot be read")
    if block[close.end() :]:
        raise _Malformed("text after the tool calls")
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _Malformed(f"a parameter that is no JSON: {text[:40]!r}") from None
