"""Chat formats other than V4's: a tokenizer's own Jinja template, without tool turns.

Control tokens in what a message says are cut by a noncharacter before the template is rendered, and
the rendered text is encoded in the parts between those: so they stay mere characters here too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.errors import DataError
from posttrain.tokenizer import controls_of

CUT = "\ufdd0"
"""A Unicode noncharacter: never part of a text that is meant for interchange."""


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
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation; own is its last turn, up to its end-of-turn token.

    Raises:
        DataError: if the template renders the conversation otherwise than its prompt and an answer.
    """
    prompt = _render(tokenizer, messages[:-1], tools, is_thinking, add_mark=True)
    whole = _render(tokenizer, messages, tools, is_thinking, add_mark=False)
    if not whole.startswith(prompt):
        raise DataError(
            "the tokenizer's chat template renders an answered conversation otherwise than the "
            f"prompt it answers (which ends {prompt[-40:]!r}): take a tokenizer with V4's format"
        )
    prompt_ids, own_ids = _encode(tokenizer, prompt), _encode(tokenizer, whole[len(prompt) :])
    end = tokenizer.eos_token_id
    while end in own_ids and own_ids[-1] != end:  # templates put a newline after the end of a turn
        own_ids.pop()
    return prompt_ids + own_ids, [False] * len(prompt_ids) + [True] * len(own_ids)


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
    cut = controls_of(tokenizer).cut
    text = tokenizer.apply_chat_template(
        [{**m, "content": CUT.join(cut(str(m.get("content") or "")))} for m in messages],
        tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
        add_generation_prompt=add_mark,
        enable_thinking=is_thinking,
        tokenize=False,
    )
    return str(text)


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
