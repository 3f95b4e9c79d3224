"""One answer of a checkpoint, told as it is sampled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from posttrain.backbone import V4ForCausalLM
from posttrain.chat import Effort, encode_prompt
from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.errors import CheckpointError, DataError
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to, until the rest has come."""


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    on_text: Callable[[str], None],
    system: str | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    effort: Effort = "none",
    seed: int = 0,
) -> Rollout:
    """Answer `prompt`, handing each new piece of text to `on_text`; the end mark is left out.

    The model goes to a GPU where there is one. `temperature` 0 is greedy.

    Raises:
        CheckpointError: there is no V4 checkpoint.
        DataError: the prompt leaves no room in the model's context.
    """
    logging.disable_progress_bar()
    loaded, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    if not isinstance(loaded, V4ForCausalLM):
        raise CheckpointError(
            f"{checkpoint} holds a {type(loaded).__name__}: only V4 models can answer here"
        )
    model: Any = loaded
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    messages = [{"role": "system", "content": system}] if system else []
    ids = encode_prompt(tokenizer, [*messages, {"role": "user", "content": prompt}], effort=effort)
    context = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        raise DataError(
            f"the prompt takes {len(ids)} tokens and the answer up to {max_new_tokens}, but the "
            f"model's context is {context}: shorten the prompt or lower --max-new-tokens"
        )
    request = Request(
        prompt_id="generate",
        prompt=ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_token_ids=(tokenizer.eos_token_id,),
    )
    telling = Telling(tokenizer, on_text)
    engine = Engine(model, num_slots=1, seed=seed, on_token=telling)
    with torch.inference_mode():
        return next(iter(engine.run([request])))


class Telling:
    """Turns the tokens so far into the new text; whole characters only."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._told = ""

    def __call__(self, request: Request, response: list[int]) -> None:
        end = self._tokenizer.eos_token_id
        text = self._tokenizer.decode([token for token in response if token != end])
        if text.endswith(UNFINISHED) and response[-1] != end:
            return
        self._on_text(text[len(self._told) :])
        self._told = text
