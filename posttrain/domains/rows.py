"""Rows: what a data source yields, checked and brought into one form, and their split.

Which side a prompt is on depends on nothing but its messages' text (case and runs of whitespace do
not count): so a prompt never crosses sides, whatever source, seed or order it comes by.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from posttrain.errors import DataError

Message = dict[str, Any]

HEARD = ("user", "developer", "tool")
"""The roles that the model answers to."""
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with all that is known about it: `Row("3f2a9c...", [{"role": "user", "content":
    "38+47="}], [{"role": "assistant", "reasoning": "8+7=15...", "content": "85"}], {"answer":
    "85"})`."""

    id: str
    """A hash of the messages."""

    messages: list[Message]
    """The prompt; ends with a user or tool message."""

    response: list[Message] | None = None
    """A demonstration: the assistant's turn, or several with tool results between; None: none."""

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    """The answer and everything else; goes to the reward and to the tools."""

    source: int = 0
    """Which part of a mixture it came from."""


def row_of(raw: object, *, where: str) -> Row:
    """The row that a source's raw row says; `where` is its place, for messages.

    Raises:
        DataError: naming the place, the field, what was found and what is needed.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: found {shown(raw)}, needed an object with a prompt")
    fields: dict[str, Any] = dict(cast("Mapping[str, Any]", raw))
    messages = _prompt(fields, where)
    last_heard = max((i for i, m in enumerate(messages) if m["role"] in HEARD), default=-1)
    if last_heard < 0:
        raise _wrong(where, "messages", messages, "at least one user message")
    answered, messages = messages[last_heard + 1 :], messages[: last_heard + 1]
    response = _demonstration(fields, where)
    if response and answered:
        raise _wrong(where, "messages", answered[0], "no assistant at the end beside a response")
    return Row(_hash(messages), messages, response or answered or None, fields)


def _prompt(fields: dict[str, Any], where: str) -> list[Message]:
    """The conversation of a raw row; its fields are taken out of `fields`."""
    prompt, messages = fields.pop("prompt", None), fields.pop("messages", None)
    if (prompt is None) == (messages is None):
        has = "both" if prompt is not None else f"neither (it has {', '.join(fields) or 'nothing'})"
        raise DataError(f"{where}: found {has} of the fields prompt and messages, needed one")
    if messages is not None:
        return _messages(messages, where, "messages")
    if isinstance(prompt, list):  # several libraries call a conversation a prompt
        return _messages(cast("list[Any]", prompt), where, "prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise _wrong(where, "prompt", prompt, "text")
    return [{"role": "user", "content": prompt}]


def _demonstration(fields: dict[str, Any], where: str) -> list[Message] | None:
    response, turns = fields.pop("response", None), fields.pop("demonstration", None)
    if response is not None and turns is not None:
        raise DataError(f"{where}: found a response and a demonstration, needed one of them")
    if turns is not None:
        messages = _messages(turns, where, "demonstration", before="user")
        if messages[-1]["role"] != "assistant":
            raise _wrong(where, "demonstration", messages[-1], "an assistant message at the end")
        return messages
    if response is None:
        return None
    if not isinstance(response, str) or not response:
        raise _wrong(where, "response", response, "text")
    reasoning, mark, content = response.partition("</think>")
    if not mark:
        return [{"role": "assistant", "content": response}]
    reasoning = reasoning.removeprefix("<think>")
    return [{"role": "assistant", "content": content, "reasoning": reasoning}]


def _messages(value: object, where: str, name: str, *, before: str = "system") -> list[Message]:
    """The conversation, in an order that every chat format can say; `before` spoke last."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _wrong(where, name, value, 'a list such as [{"role": "user", "content": "Hi"}]')
    messages: list[Message] = []
    for i, raw in enumerate(cast("list[Any]", value)):
        message = _message(raw, where, f"{name}[{i}]")
        if message["role"] == "system" and before != "system":
            raise _wrong(where, f"{name}[{i}]", raw, "system messages in front of all others only")
        if message["role"] == "assistant" and before not in HEARD:
            raise _wrong(where, f"{name}[{i}]", raw, "a user message before the assistant's")
        if message["role"] == "latest_reminder" and before in HEARD:
            raise _wrong(where, f"{name}[{i}]", raw, "a reminder before what the user says")
        before = message["role"]
        messages.append(message)
    if before == "latest_reminder":
        raise _wrong(where, f"{name}[{len(messages) - 1}]", value[-1], "a message after a reminder")
    return _in_call_order(cast("list[Mapping[str, Any]]", value), messages, where, name)


def _in_call_order(
    raw: Sequence[Mapping[str, Any]], messages: list[Message], where: str, name: str
) -> list[Message]:
    """With the results of a message's tool calls in the order of the calls, where both have ids:
    the encoding has none."""
    found, ids, first = list(messages), list[Any](), 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            ids = [call.get("id") for call in raw[i].get("tool_calls") or []]
        if message["role"] != "tool":
            first = i + 1
            continue
        told = [raw[k].get("tool_call_id") for k in range(first, i + 1)]
        if not (ids and all(ids) and all(told)):
            continue
        if told[-1] not in ids or told[-1] in told[:-1]:
            expected = f"the id of a call that has no result yet, of {ids}"
            raise _wrong(where, f"{name}[{i}].tool_call_id", told[-1], expected)
        block = zip(map(ids.index, told), range(first, i + 1), strict=True)
        found[first : i + 1] = [messages[k] for _, k in sorted(block)]
    return found


def _message(value: object, where: str, name: str) -> Message:
    """The message with our keys only; OpenAI's form of tool calls is understood."""
    if not isinstance(value, Mapping):
        raise _wrong(where, name, value, "an object with role and content")
    message = cast("Mapping[str, Any]", value)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _wrong(where, f"{name}.role", role, f"one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    if not isinstance(content, str) and not (content is None and calls):
        raise _wrong(where, f"{name}.content", content, "text")
    found: Message = {"role": role, "content": content or ""}
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise _wrong(where, f"{name}.reasoning", reasoning, "text")
    if reasoning:
        found["reasoning"] = reasoning
    if calls:
        found["tool_calls"] = [
            _call(c, where, f"{name}.tool_calls[{i}]") for i, c in enumerate(calls)
        ]
    return found


def _call(value: object, where: str, name: str) -> dict[str, Any]:
    call: Any = value.get("function", value) if isinstance(value, Mapping) else None
    arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise _wrong(where, f"{name}.arguments", arguments, "a JSON object") from None
    if not isinstance(arguments, Mapping) or not isinstance(call.get("name"), str):
        raise _wrong(where, name, value, '{"name": text, "arguments": object}')
    return {"name": call["name"], "arguments": dict(cast("Mapping[str, Any]", arguments))}


def refuse_names_of_tool_arguments(rows: Iterable[Row]) -> None:
    """A row's fields are keyword arguments of a tool beside these two. Raises DataError."""
    for row in rows:
        taken = {"name", "arguments"} & row.fields.keys()
        if taken:
            raise DataError(
                f"the row with prompt {shown(row.messages[-1]['content'])} has a field "
                f"{taken.pop()!r}, which the domain's tools get from the model: call it "
                "otherwise, for example with data.columns"
            )


def _wrong(where: str, name: str, value: object, needed: str) -> DataError:
    return DataError(f"{where}, field {name}: found {shown(value)}, needed {needed}")


def shown(value: object) -> str:
    """The value as Python writes it, cut for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hash(messages: Sequence[Message]) -> str:
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def is_heldout(messages: Sequence[Mapping[str, Any]], share: float) -> bool:
    """Whether the prompt is on the held-out side; a larger share holds out a superset."""
    texts = [f"{m['role']} {' '.join(str(m['content']).casefold().split())}" for m in messages]
    digest = hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(
    rows: Sequence[Row], heldout_share: float, *, untrained_share: float = 0.0
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those held out, in order; of equal prompts the first stays. Those
    between the two shares are on neither side."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.id, row)
    share = max(heldout_share, untrained_share)
    train = [row for row in first.values() if not is_heldout(row.messages, share)]
    return train, [row for row in first.values() if is_heldout(row.messages, heldout_share)]
