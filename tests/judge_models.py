"""Judges made by hand: what they say is looked up, but for one that counts."""

from itertools import pairwise
from pathlib import Path

import torch
from lookup_models import looking_up, with_words

from posttrain.checkpoints import save_checkpoint
from posttrain.judge import JudgeModel
from posttrain.judge_config import JudgeConfig
from posttrain.judge_prompts import judge_messages
from posttrain.tokenizer import END_THINK, EOS, build_tokenizer

LENGTH = 420
"""About as many tokens as a judge of one short answer reads; counts are shares of it."""


def counted_characters(config: JudgeConfig, *, rubric: str) -> str:
    """Those that stand nowhere in what a judge reads besides prompt and answer."""
    frame = judge_messages(config, prompt="", rubric=rubric, answers=[""])
    text = "".join(message["content"] for message in frame)
    return "".join(chr(i) for i in range(33, 127) if chr(i) not in text)


def spelling(text: str) -> dict[str, str]:
    """How a byte-level model comes to say `text`, of different characters, after the mark."""
    tokens = [END_THINK, *text.replace(" ", "Ġ"), EOS]
    return dict(pairwise(tokens))


def always_says(text: str, *, context: int = 4096) -> JudgeModel:
    """`text`, whatever is asked."""
    tokenizer = build_tokenizer()
    return JudgeModel(looking_up(tokenizer, spelling(text), context=context), tokenizer)


def counting(counted: str) -> JudgeModel:
    """`Score: N`, N one more than how many `counted` characters it reads, 9 at most: attention is
    the same to all tokens, and its values are 1 for those that count."""
    tokenizer = build_tokenizer()
    ids, digits = tokenizer.get_vocab(), "123456789"
    model = looking_up(tokenizer, {**spelling("Score: "), **dict.fromkeys(digits, EOS)})
    width = model.config.hidden_size
    attention, head = model.model.layers[0].self_attn, model.lm_head.weight
    with torch.no_grad():
        head[ids[EOS], ids["Ġ"]] = 0.0
        for character in counted:  # the norm makes a one-hot vector's 1 the root of its width
            attention.v_proj.weight[0, ids[character]] = width**-0.5
        attention.o_proj.weight[-1, 0] = 1.0
        for n, digit in enumerate(digits):  # the largest is at the n nearest to the count
            head[ids[digit], ids["Ġ"]] = 100.0 - n * n / 2
            head[ids[digit], -1] = n * float(LENGTH)
    return JudgeModel(model, tokenizer)


def prefers_the_first() -> JudgeModel:
    """`Better: A`, whatever is asked; with a tokenizer of its own, in which `Better:` is one."""
    tokenizer = with_words("Better:")
    says = {END_THINK: "Better:", "Better:": "Ġ", "Ġ": "A", "A": EOS}
    return JudgeModel(looking_up(tokenizer, says), tokenizer)


def saved(judge: JudgeModel, folder: Path) -> Path:
    """The judge as a checkpoint."""
    save_checkpoint(judge.model, judge.tokenizer, folder)
    return folder


def saying_either(text: str, last: str) -> JudgeModel:
    """`text` and one of the characters in `last`, all as likely."""
    tokenizer = build_tokenizer()
    model, ids = looking_up(tokenizer, spelling(text)), tokenizer.get_vocab()
    before = text[-1].replace(" ", "Ġ")
    with torch.no_grad():
        model.lm_head.weight[ids[EOS], ids[before]] = 0.0
        for character in last:
            model.lm_head.weight[ids[character], ids[before]] = 1000.0
            model.lm_head.weight[ids[EOS], ids[character]] = 1000.0
    return JudgeModel(model, tokenizer)
