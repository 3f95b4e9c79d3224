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
"""Stands inside what is no control token though spelled like one, until the turn is taken apart.
One that was written stands there twice."""

OPEN_INVOKE = f'<{DSML}invoke name="'
INVOKE = re.compile(f'{OPEN_INVOKE}([^"]*)">\n?')
PARAMETER = re.compile(
    f'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>\n?', re.DOTALL
)
OPEN_CALLS = f"<{DSML}tool_calls>"
END_INVOKE = re.compile(f"\n?</{DSML}invoke>\n?")
END_CALLS = re.compile(f"</{DSML}tool_calls>")
WRITTEN_OR_CUT = re.compile(f"{CUT}({CUT}?)")


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

    whole_calls: list[ToolCall] = field(default_factory=list[ToolCall])
    """The calls that are whole in a block of which something is not. Nothing makes them: rewards
    and environments see `tool_calls`, a block whole or not at all."""

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
    """A call that cannot be read."""


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
    whole: list[ToolCall] = []
    if opened:
        whole, broken = _calls(block)
        if broken:
            content, problem = text, broken
        else:
            content, calls, whole = content.removesuffix("\n\n"), whole, []
    if not problem and controls_of(tokenizer).pattern.search(reasoning + CUT + content):
        problem = "a control token inside the text"
    return Turn(clean(reasoning), clean(content), calls, problem, whole)


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
            parts.append(CUT.join(controls.cut(text.replace(CUT, CUT + CUT))))
            run = []
        if token is not None:
            parts.append(controls.id_to_spelling[token])
    return "".join(parts)


def clean(text: str) -> str:
    """What was written, of a part of `text_of`."""
    return WRITTEN_OR_CUT.sub(r"\1", text)


def _calls(block: str) -> tuple[list[ToolCall], str | None]:
    """The whole calls of a block, and what is wrong with the block. A call begins with its open
    tag, whatever became of the one before."""
    close = END_CALLS.search(block)
    before, *rest = block[: close.start() if close else len(block)].split(OPEN_INVOKE)
    whole: list[ToolCall] = []
    problems = ["text before the tool calls"] if before.strip("\n") else []
    for i, text in enumerate(rest, 1):
        name = clean(text.partition('"')[0])
        try:
            whole.append(_call(OPEN_INVOKE + text))
        except _Malformed as error:
            problems.append(f"tool call {i} ({name[:40]!r}) {error}")
    if not rest:
        problems.append("a block of tool calls without a call")
    if not close:
        problems.append("the block of tool calls has no end")
    elif block[close.end() :]:
        problems.append("text after the tool calls")
    return whole, "; ".join(problems) or None


def _call(text: str) -> ToolCall:
    """The call of a text that holds nothing else. Raises _Malformed."""
    invoke = INVOKE.match(text)
    if not invoke:
        raise _Malformed("has a name without an end")
    at = invoke.end()
    arguments: dict[str, Any] = {}
    while parameter := PARAMETER.match(text, at):
        at = parameter.end()
        key, is_string, value = parameter.groups()
        if DSML in value:
            raise _Malformed(f"has a parameter without an end: {clean(key)[:40]!r}")
        arguments[clean(key)] = clean(value) if is_string == "true" else _json(clean(value))
    end = END_INVOKE.match(text, at)
    if not end:
        raise _Malformed(f"cannot be read from {clean(text[at:])[:40]!r} on")
    if text[end.end() :]:
        raise _Malformed(f"has text behind its end: {clean(text[end.end() :])[:40]!r}")
    return ToolCall(clean(invoke[1]), arguments)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _Malformed(f"has a parameter that is no JSON: {text[:40]!r}") from None
