"""Compile every loop: `python -m posttrain.backbone.host.build`, which `is_built` runs."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.backbone import V4Cache, V4ForCausalLM, preset_config
from posttrain.backbone.chunks import Chunk, step


def main() -> None:
    """Each once, on a small model: decoding, reading in chunks, scoring, a training step."""
    tokens = 48
    config = preset_config("tiny", vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "index_topk": 4, "sliding_window": 8})
    model: Any = V4ForCausalLM(config)
    ids = torch.randint(3, 64, (2, tokens))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    cache = V4Cache(config, 16, like=model.lm_head.weight, num_spare=7)
    token_B, live_B = ids[0, :16], torch.ones(16, dtype=torch.long)
    live_B[0] = 0
    chunk = Chunk(ids[:1, :8], torch.tensor([8]), torch.tensor([0]))
    for reach in range(8, 8 + tokens):
        step(model.model, cache, token_B=token_B, is_live_B=live_B, reach=reach)
    step(model.model, cache, token_B=token_B, is_live_B=live_B, chunk=chunk, reach=64)
    model.model.decode(token_B, cache, live_B)


if __name__ == "__main__":
    main()
