"""Chat formats other than V4's: a tokenizer's own Jinja template. Calls and tools' results can be
learned from in it, not sampled.

Control tokens in what a message says are cut by a noncharacter before the template is rendered, and
the rendered text is encoded in the parts between those: so they stay mere characters here too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.errors import DataError
from posttrain.tokenizer import controls_of

CUT = "\ufdd0"
"""A Unicode noncharacter: never part of a text that is meant for interchange."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    is_thinking: bool = False,
) -> list[int]:
    """The ids of the messages and of the template's mark to answer after."""
    return _encode(tokenizer, _render(tokenizer, messages, tools, is_thinking, add_mark=True))


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    is_thinking: bool = False,
    since: int = 0,
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation; own are the assistant's turns from message `since` on, each up to
    its end-of-turn token.

    They stand where the template marks them with `{% generation %}`, or else where it goes on from
    what it renders of the messages before. The text is encoded in the parts between, as it is when
    a turn is sampled.

    Raises:
        DataError: if the template renders the conversation otherwise than its prompt and an answer.
    """
    whole = _render(tokenizer, messages, tools, is_thinking, add_mark=False)

    def length(i: int, *, add_mark: bool) -> int:
        """Characters of the first `i` messages, which have to begin the whole."""
        part = _render(tokenizer, messages[:i], tools, is_thinking, add_mark=add_mark)
        if whole.startswith(part):
            return len(part)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'!r} renders the first "
            f"{i} of {len(messages)} messages otherwise alone (ending {part[-40:]!r}) than in the "
            "whole conversation, so that the assistant's tokens cannot be told: mark them in it "
            "with {% generation %}, learn the completion alone (loss: completion), or take a "
            "tokenizer with V4's format"
        )

    turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= since]
    length(turns[-1], add_mark=True)  # what is sampled goes on from it
    if GENERATION.search(_template_of(tokenizer, tools)):
        first = length(turns[0], add_mark=True) if since else 0
        marked = _generated(tokenizer, messages, tools, is_thinking)
        spans = [span for span in marked if span[0] >= first]
    else:
        spans = [(length(i, add_mark=True), length(i + 1, add_mark=False)) for i in turns]
    return _encode_spans(tokenizer, whole, spans)


def _encode_spans(
    tokenizer: PreTrainedTokenizerBase, whole: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The ids of the text up to its last own one, and whether each is in a span (start, end of
    characters). A turn ends with its end-of-turn token, be that the span's last or the next:
    templates put a newline after it."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    is_own: list[bool] = []
    at = 0
    for start, stop in [*spans, (len(whole), len(whole))]:
        between = _encode(tokenizer, whole[at:start])
        if is_own and is_own[-1] and ids[-1] != end and between[:1] == [end]:
            is_own.append(True)
            ids.append(between.pop(0))
        turn = _encode(tokenizer, whole[start:stop])
        num_own = len(turn) - turn[::-1].index(end) if end in turn else len(turn)
        ids += between + turn
        is_own += [False] * len(between) + [i < num_own for i in range(len(turn))]
        at = stop
    num_kept = len(ids) - is_own[::-1].index(True) if any(is_own) else len(ids)
    return ids[:num_kept], is_own[:num_kept]


def _generated(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    is_thinking: bool,
) -> list[tuple[int, int]]:
    """Where the template says that the assistant wrote, in characters: what transformers makes its
    `return_assistant_tokens_mask` of."""
    options: dict[str, Any] = {**tokenizer.special_tokens_map, "enable_thinking": is_thinking}
    _, found = render_jinja_template(
        [_plain(tokenizer, messages)],
        tools=_schemas(tools),
        chat_template=_template_of(tokenizer, tools),
        return_assistant_tokens_mask=True,
        **options,
    )
    return [(int(start), int(stop)) for start, stop in cast("Any", found)[0]]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    is_thinking: bool,
    *,
    add_mark: bool,
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has neither DeepSeek-V4's control tokens nor a chat template: set its "
            "chat_template and save it with the checkpoint"
        )
    _check_roles(messages)
    text = tokenizer.apply_chat_template(
        _plain(tokenizer, messages),
        tools=_schemas(tools),
        add_generation_prompt=add_mark,
        enable_thinking=is_thinking,
        tokenize=False,
    )
    return str(text)


def _template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]) -> str:
    return tokenizer.get_chat_template(None, cast("Any", _schemas(tools)))


def _schemas(tools: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    return [{"type": "function", "function": dict(tool)} for tool in tools] or None


def _plain(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages as templates know them, with whatever they say cut where it is spelled like a
    control token."""
    cut = controls_of(tokenizer).cut

    def said(value: Any) -> Any:
        if isinstance(value, str):
            return CUT.join(cut(value))
        if isinstance(value, Mapping):
            return {said(key): said(part) for key, part in cast("Any", value).items()}
        return [said(part) for part in cast("Any", value)] if isinstance(value, list) else value

    found: list[dict[str, Any]] = []
    for message in messages:
        told = {key: said(value) for key, value in message.items() if key != "tool_calls"}
        told |= {"role": message.get("role"), "content": told.get("content") or ""}
        if calls := message.get("tool_calls"):
            told["tool_calls"] = [{"type": "function", "function": said(call)} for call in calls]
        found.append(told)
    return found


def _check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    """Templates leave roles out that they do not know."""
    for i, message in enumerate(messages):
        if (role := message.get("role")) in ("developer", "latest_reminder"):
            raise DataError(
                f"message {i} has role {role!r}, which is DeepSeek-V4's, and this tokenizer has a "
                "template of its own: make it a system or user message"
            )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = []
    for part in text.split(CUT):
        ids += tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    return ids
