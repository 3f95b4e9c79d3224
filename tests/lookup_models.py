"""Models made by hand: Llamas of one layer whose next token depends on the last one alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.tokenizer import build_tokenizer


def looking_up(
    tokenizer: Any,
    following: Mapping[str, str | Sequence[str]],
    *,
    weight: float = 1000.0,
    context: int = 4096,
) -> Any:
    """A model that says after each token one of those that `following` has for it, all as likely;
    `weight` says how surely. Embeddings are one-hot, the layer adds nothing, and the last dimension
    is free."""
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=len(ids) + 1,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=4,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(len(ids), len(ids) + 1))
        for token, found in following.items():
            for next_token in [found] if isinstance(found, str) else found:
                model.lm_head.weight[ids[next_token], ids[token]] = weight
    return model.eval()


def with_words(*words: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in V4's format in which each of `words` is one token: a word is merged
    from its left, letter by letter."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        merges |= {(word[:i], word[i]): None for i in range(1, len(word))}
    tokenizer = build_tokenizer()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for word in map("".join, merges):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=list(merges))
    return tokenizer
