"""Messages to token ids and back, in DeepSeek-V4's format or by another tokenizer's own template.

A message is a dict: `role` (system, user, assistant, tool, developer, latest_reminder) and
`content`; an assistant's may have `reasoning` and `tool_calls` ([{"name", "arguments": dict}]). In
V4's format:

    BOS system tools <User>text<Assistant></think>answer EOS                    effort none
    BOS system tools <User>text<Assistant><think>reasoning</think>answer EOS    any other effort

    BOS system <latest_reminder>text<User>text<Assistant>     a reminder, before what it goes with

Tool results, in call order, are the next user turn. A developer speaks in a turn of its own, with
the user's mark; before the last user turn V4 drops it where the model thinks and has no tools, as
it drops earlier reasoning. Only the format's own text may become control tokens: whatever a message
says is encoded as mere characters, so that nobody can forge a turn; marks that are characters
themselves are told apart by marks.py.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from posttrain.chat import template
from posttrain.chat.marks import (
    CLOSE_RESULT,
    MAX_EFFORT,
    NUMBER_EFFORT,
    OPEN_RESULT,
    hide_effort,
    hide_tag,
)
from posttrain.config import Effort
from posttrain.errors import DataError
from posttrain.tokenizer import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    THINK,
    USER,
    controls_of,
    encode_plain,
)

Message = Mapping[str, Any]

ASKING = ("user", "developer")
"""The roles whose last message begins what the model thinks about."""

TOOLS_HEAD = f"""## Tools

Call tools by ending your answer with a block of this form, one invoke for each call:

<{DSML}tool_calls>
<{DSML}invoke name="$NAME">
<{DSML}parameter name="$PARAMETER" string="true|false">$VALUE</{DSML}parameter>
</{DSML}invoke>
</{DSML}tool_calls>

A string stands as it is, with string="true"; any other value is JSON, with string="false".

### Available Tool Schemas

"""


class Piece(NamedTuple):
    """A stretch of a conversation's text."""

    text: str
    is_format: bool = False
    """Written by the format: its control tokens count. Elsewhere they are mere characters."""

    is_own: bool = False
    """Written by the model: it learns from it."""

    hidden_tag: str = ""
    """What the text must not be taken for: `hide_tag`."""


def is_v4(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has the control tokens of V4's format."""
    return {USER, ASSISTANT, THINK, END_THINK} <= controls_of(tokenizer).spelling_to_id.keys()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    effort: Effort = "none",
) -> list[int]:
    """The ids of `messages`, which end with a user, developer or tool turn, and the mark to answer
    after.

    Raises:
        DataError: if the messages are empty, end otherwise, or hold an unknown role or a name that
            V4's format cannot say.
    """
    if not messages or messages[-1].get("role") in ("assistant", "latest_reminder"):
        raise DataError(
            "a prompt must end with a user or tool message, so that there is a turn to answer"
        )
    if not is_v4(tokenizer):
        return template.encode_prompt(
            tokenizer, messages, tools=tools, is_thinking=effort != "none"
        )
    _check_reminders(tokenizer, messages)
    return _encode(tokenizer, _conversation(messages, tools, effort))[0]


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    effort: Effort = "none",
    since: int = 0,
) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation and, for each, whether the assistant wrote it (its EOS too)
    in message `since` or later.

    Raises:
        DataError: if the messages do not end with the assistant, or hold an unknown role or a name
            that V4's format cannot say.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(
            "an example must end with an assistant message: there is nothing to learn from"
        )
    if not is_v4(tokenizer):
        return template.encode_example(
            tokenizer, messages, tools=tools, is_thinking=effort != "none", since=since
        )
    _check_reminders(tokenizer, messages)
    return _encode(tokenizer, _conversation(messages, tools, effort, since=since))


def encode_tool_results(
    tokenizer: PreTrainedTokenizerBase, results: Sequence[str], *, effort: Effort = "none"
) -> list[int]:
    """The ids between the model's call and its next turn: the results' user turn, the mark.

    Raises:
        DataError: for a tokenizer without V4's format.
    """
    if not is_v4(tokenizer):
        raise DataError(
            "tools need a tokenizer with DeepSeek-V4's chat format; this one has its own template"
        )
    turn = _user_turn([{"role": "tool", "content": result} for result in results])
    return _encode(tokenizer, [*turn, _mark(is_thinking=effort != "none")])[0]


def _check_reminders(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> None:
    has_reminder = any(m.get("role") == "latest_reminder" for m in messages)
    if has_reminder and REMINDER not in controls_of(tokenizer).spelling_to_id:
        raise DataError(
            f"a message has role latest_reminder, and the tokenizer has no token {REMINDER}: put "
            "its text into the system or user message, or take a base with V4's own vocabulary"
        )


def _check_names(names: Sequence[str], *, where: str) -> None:
    for name in names:
        if '"' in name:
            raise DataError(
                f"{where} calls a tool or names an argument {name!r}: V4's format ends a name at "
                "its first quotation mark, so rename it"
            )


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The block that tells the model its tools, one JSON schema a line."""
    return "".join(piece.text for piece in _tools_block(tools))


def _tools_block(tools: Sequence[Mapping[str, Any]]) -> list[Piece]:
    schemas = [json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools]
    return [Piece(TOOLS_HEAD, is_format=True), *map(Piece, schemas)]


def _encode(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]
) -> tuple[list[int], list[bool]]:
    """The pieces' ids and their is_own.

    Text between two control tokens is encoded in one go, whoever wrote it, as a tokenizer with
    merges would encode the whole.
    """
    controls = controls_of(tokenizer)
    ids: list[int] = []
    is_own: list[bool] = []
    text, text_is_own = "", False

    def flush() -> None:
        nonlocal text
        new = encode_plain(tokenizer, text)
        ids.extend(new)
        is_own.extend([text_is_own] * len(new))
        text = ""

    for piece in pieces:
        if piece.is_own != text_is_own:
            flush()
            text_is_own = piece.is_own
        said = hide_tag(piece.text, piece.hidden_tag, controls.spelling_to_id)
        for part in controls.pattern.split(said) if piece.is_format else (said,):
            if piece.is_format and part in controls.spelling_to_id:
                flush()
                ids.append(controls.spelling_to_id[part])
                is_own.append(piece.is_own)
            else:
                text += part
    flush()
    return ids, is_own


def _conversation(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    effort: Effort,
    *,
    since: int = 0,
) -> list[Piece]:
    """A V4 conversation; it ends with the mark to answer after, or with the assistant's EOS. Own
    are the turns from message `since` on."""
    num_system = next(
        (i for i, m in enumerate(messages) if m.get("role") != "system"), len(messages)
    )
    system = "\n\n".join(str(m["content"]) for m in messages[:num_system])
    pieces = [Piece(BOS, is_format=True)]
    pieces.append(Piece(effort_text(effort) + hide_effort(system)))
    if tools:
        pieces += [Piece("\n\n" if system else ""), *_tools_block(tools)]

    has_tools = bool(tools) or any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)
    last_user = max((i for i, m in enumerate(messages) if m.get("role") in ASKING), default=-1)
    heard: list[Message] = []
    for i, message in enumerate(messages[num_system:], num_system):
        match message.get("role"):
            case "developer" if effort != "none" and not has_tools and i < last_user:
                pass
            case "user" | "tool" | "developer":
                heard.append(message)
            case "latest_reminder" if heard:
                raise DataError(
                    f"message {i} is a latest_reminder behind what it goes with: put it before the "
                    "user's, developer's and tools' messages of its turn"
                )
            case "latest_reminder":
                pieces += [Piece(REMINDER, is_format=True), Piece(str(message["content"]))]
            case "assistant" if not heard:
                raise DataError(
                    f"message {i} is the assistant's, but nobody spoke since its last: add a "
                    "user's (where V4 thinks it hears no developer before the last user's message)"
                )
            case "assistant":
                # The reasoning of turns before the last user message is dropped, as V4 does it,
                # unless there are tools, whose use it explains.
                is_thinking = effort != "none" and (has_tools or i > last_user)
                pieces += [*_heard(heard), _mark(is_thinking=is_thinking)]
                turn = _assistant_turn(message, where=f"message {i}", is_thinking=is_thinking)
                pieces += [piece._replace(is_own=i >= since) for piece in turn]
                heard = []
            case role:
                raise DataError(
                    f"message {i} has role {role!r}: needed is user, assistant, tool, developer or "
                    "latest_reminder (or system, in front of the others)"
                )
    if heard:
        pieces += [*_heard(heard), _mark(is_thinking=effort != "none")]
    return pieces


def effort_text(effort: Effort) -> str:
    """What the system text begins with at this effort."""
    if isinstance(effort, int):
        return NUMBER_EFFORT.format(number=effort)
    return MAX_EFFORT if effort == "max" else ""


def _mark(*, is_thinking: bool) -> Piece:
    return Piece(ASSISTANT + (THINK if is_thinking else END_THINK), is_format=True)


def _heard(heard: Sequence[Message]) -> list[Piece]:
    """What was said since the assistant's last turn; each developer's message is its own turn."""
    turns: list[list[Message]] = []
    for message in heard:
        if not turns or "developer" in (message["role"], turns[-1][-1]["role"]):
            turns.append([])
        turns[-1].append(message)
    return [piece for turn in turns for piece in _user_turn(turn)]


def _user_turn(heard: Sequence[Message]) -> list[Piece]:
    """What the user and the tools said since the assistant's last turn, as one turn."""
    pieces = [Piece(USER, is_format=True)]
    for i, message in enumerate(heard):
        pieces += [Piece("\n\n")] if i else []
        text = str(message["content"])
        if message["role"] == "tool":
            pieces.append(Piece(OPEN_RESULT, is_format=True))
            pieces.append(Piece(text, hidden_tag=CLOSE_RESULT))
            pieces.append(Piece(CLOSE_RESULT, is_format=True))
        else:
            pieces.append(Piece(text, hidden_tag=OPEN_RESULT))
    return pieces


def _assistant_turn(message: Message, *, where: str, is_thinking: bool) -> list[Piece]:
    def form(text: str) -> Piece:
        return Piece(text, is_format=True, is_own=True)

    def said(text: str) -> Piece:
        return Piece(text, is_own=True)

    pieces = [said(str(message.get("reasoning") or "")), form(END_THINK)] if is_thinking else []
    pieces.append(said(str(message.get("content") or "")))
    calls = message.get("tool_calls") or []
    if calls:
        pieces.append(form(f"\n\n<{DSML}tool_calls>\n"))
        for call in calls:
            _check_names([call["name"], *call["arguments"]], where=where)
            pieces += [form(f'<{DSML}invoke name="'), said(call["name"]), form('">\n')]
            for key, value in call["arguments"].items():
                is_string = isinstance(value, str)
                text = value if is_string else json.dumps(value, ensure_ascii=False)
                pieces += [form(f'<{DSML}parameter name="'), said(key)]
                pieces += [form(f'" string="{str(is_string).lower()}">'), said(text)]
                pieces.append(form(f"</{DSML}parameter>\n"))
            pieces.append(form(f"</{DSML}invoke>\n"))
        pieces.append(form(f"</{DSML}tool_calls>"))
    return [*pieces, form(EOS)]
