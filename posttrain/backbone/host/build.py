"""Compile every loop, on all cores: `python -m posttrain.backbone.host.build`, which `is_built`
runs."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from typing import Any

import torch

from posttrain.backbone import V4Cache, V4ForCausalLM, preset_config
from posttrain.backbone.chunks import Chunk, step
from posttrain.backbone.host.draw import draw
from posttrain.backbone.host.loops import to_compile


def main() -> None:
    """Each for the types that it is called with."""
    torch.set_num_threads(1)  # a fork has no threads but one
    call_all()
    fork = get_context("fork")
    counter = fork.Value("i", 0)
    processes = [fork.Process(target=compile_next, args=[counter]) for _ in range(num_cores())]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)


def compile_next(counter: Any) -> None:
    """Of all loops the next that no other process has taken, while there are any."""
    while True:
        with counter.get_lock():
            place, counter.value = counter.value, counter.value + 1
        if place >= len(to_compile):
            return
        to_compile[place]()


def num_cores() -> int:
    """Those that this process may use."""
    return min(len(os.sched_getaffinity(0)), len(to_compile))


def call_all() -> None:
    """A small model reads, learns, decodes, reads in chunks, and samples."""
    tokens = 48
    config = preset_config("tiny", vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "index_topk": 4, "sliding_window": 8})
    model: Any = V4ForCausalLM(config)
    ids = torch.randint(3, 64, (2, tokens))
    model(input_ids=ids, labels=ids).loss.backward()
    cache = V4Cache(config, 16, like=model.lm_head.weight, num_spare=7)
    token_B, live_B = ids[0, :16], torch.ones(16, dtype=torch.long)
    chunk = Chunk(ids[:1, :8], torch.tensor([8]), torch.tensor([0]))
    for reach in (8, tokens):
        step(model.model.eval(), cache, token_B=token_B, is_live_B=live_B, reach=reach)
        cache.length_B += reach
    live_B[0] = 0
    step(model.model, cache, token_B=token_B, is_live_B=live_B, chunk=chunk, reach=64)
    draw(torch.zeros(16, 64), torch.zeros(16, dtype=torch.float64), None)


if __name__ == "__main__":
    main()
