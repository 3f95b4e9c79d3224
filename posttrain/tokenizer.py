"""The tokenizer of models made from nothing, and what any tokenizer must answer for.

Text is bytes (256 ids, no merges). DeepSeek-V4's control tokens keep their exact spelling; the tags
of a tool call, which V4 spells in several tokens, are one token each here, so that a call costs a
byte-level model about eight tokens besides its name, keys and values. The text stays V4's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from posttrain.errors import TokenizerMismatch

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
REMINDER = "<｜latest_reminder｜>"
"""In V4's own vocabulary; models made from nothing do without it."""

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML)
"""Ids 0, 1, 2 are V4's own; the others keep V4's names only."""

TAG_TOKENS = (
    "<tool_result>",
    "</tool_result>",
    f"\n\n<{DSML}tool_calls>\n",
    f"</{DSML}tool_calls>",
    f'<{DSML}invoke name="',
    '">\n',
    f"</{DSML}invoke>\n",
    f'<{DSML}parameter name="',
    '" string="true">',
    '" string="false">',
    f"</{DSML}parameter>\n",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer: 8 control tokens, 256 bytes, 11 tags; the same ids every time."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet, *TAG_TOKENS))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(t, normalized=False) for t in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Controls:
    """A tokenizer's control tokens: the spellings that it turns into one id wherever they stand.

    One-character added tokens are left out: they cannot be cut, and no chat format uses them.
    """

    spelling_to_id: Mapping[str, int]

    @cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(self.spelling_to_id.values())

    @cached_property
    def id_to_spelling(self) -> dict[int, str]:
        return {token: spelling for spelling, token in self.spelling_to_id.items()}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """One group around the leftmost, longest control token; without any, it matches nothing."""
        longest_first = sorted(self.spelling_to_id, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def cut(self, text: str) -> list[str]:
        """`text` in parts none of which holds a control token: each is cut after its first
        character."""
        parts: list[str] = []
        while match := self.pattern.search(text):
            parts.append(text[: match.start() + 1])
            text = text[match.start() + 1 :]
        return [*parts, text]


_CONTROLS: WeakKeyDictionary[PreTrainedTokenizerBase, Controls] = WeakKeyDictionary()


def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """The control tokens of any tokenizer, read once."""
    if tokenizer not in _CONTROLS:
        added: dict[str, int] = cast(Any, tokenizer).get_added_vocab()
        _CONTROLS[tokenizer] = Controls({t: i for t, i in added.items() if len(t) > 1})
    return _CONTROLS[tokenizer]


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` as mere characters: what looks like a control token in it becomes none."""
    ids: list[int] = []
    for part in controls_of(tokenizer).cut(text):
        if part:
            ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def check_same_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, name: str
) -> None:
    """Refuse teacher `name` unless it maps every token to the student's id.

    Raises:
        TokenizerMismatch: with the first differing token, by the student's id.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = [
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    ]
    if not differing:
        return
    first = min(differing, key=lambda token: (ours.get(token, len(ours)), token))
    raise TokenizerMismatch(
        f"teacher {name!r} gives {len(differing)} of {len(ours)} tokens another id: {first!r} is "
        f"{theirs.get(first, 'missing')} there and {ours.get(first, 'missing')} in the student. "
        "Full-vocabulary KL compares ids, so a teacher must be trained from the student's base "
        "checkpoint."
    )
