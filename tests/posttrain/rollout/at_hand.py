"""A small model, requests and runs that the laws of the engine are tried on."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.rollout import Request, Rollout
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal

VOCAB = 40


def make_model(*, seed: int = 0, sharpness: float = 20, vocab_size: int = VOCAB) -> V4ForCausalLM:
    """Window 6, top-k 3. At sharpness 20 it is so sure that rounding never decides."""
    config = preset_config(
        "tiny", vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    config.update(
        {
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "sliding_window": 6,
            "index_topk": 3,
            "hc_sinkhorn_iters": 3,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        model.lm_head.weight.data *= sharpness
    return model.eval()


def make_requests(
    count: int, *, longest: int = 20, seed: int = 1, max_new_tokens: int = 24, **more: Any
) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        Request(
            prompt_id=f"p{i}",
            prompt=torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
            max_new_tokens=max_new_tokens,
            stop_token_ids=(1, 5),
            **more,
        )
        for i, length in enumerate(lengths)
    ]


def run(
    model: Any, requests: Iterable[Request], num_slots: int = 4, **options: Any
) -> dict[tuple[str, int], Rollout]:
    engine = Engine(model, num_slots=num_slots, seed=0, **options)
    return {(r.prompt_id, r.sample): r for r in engine.run(requests)}


def said_by_a_tool(own: list[int]) -> list[int] | None:
    """Forty tokens, more than a chunk, after the first turns; None after a turn of many tokens."""
    return [6 + (len(own) + i) % 30 for i in range(40)] if len(own) < 8 else None


def journaled_requests() -> list[Request]:
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.8, "wants_support": True}]
    kinds += [{"continue_turn": said_by_a_tool}, {"wants_routes": True}]
    asked = make_requests(12, longest=50, seed=12, max_new_tokens=90)
    return [replace(r, **kinds[i % len(kinds)]) for i, r in enumerate(asked)]


def run_with_journal(path: str) -> dict[tuple[str, int], Rollout]:
    """In a process that may be killed."""
    torch.set_num_threads(1)
    journal = Journal(path)
    found = run(make_model(sharpness=3), journaled_requests(), 3, journal=journal)
    journal.close()
    return found
