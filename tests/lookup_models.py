"""Models made by hand: Llamas of one layer whose next token depends on the last one alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, TAG_TOKENS


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
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *map("".join, merges), *TAG_TOKENS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
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
