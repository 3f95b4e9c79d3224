"""What packing saves: seconds of a step's microbatches, packed and padded, in turns.

    python benchmarks/packing.py        writes docs/packing.md and its .json

Rows are as long as a log-normal draw says (median 60, sigma 0.9); a step has 32 of them, eight at a
time. V4 is the `tiny` preset, the other model a Llama of its size with transformers' sdpa.
"""

import argparse
import math
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import measured
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.tokenizer import build_tokenizer
from specialists.config import SftConfig
from specialists.packing import packed
from specialists.pretrain import new_model
from specialists.rows import TokenRow
from specialists.sft import in_order

PAGE = Path(__file__).resolve().parents[1] / "docs" / "packing.md"
CONFIG = SftConfig(num_steps=4, rows_per_step=32, rows_per_microbatch=8)
ROUNDS = 5

Batch = dict[str, Any]


def rows(num_tokens: int) -> list[TokenRow]:
    rng = Random(0)
    lengths = [max(8, min(1000, round(rng.lognormvariate(math.log(60), 0.9)))) for _ in range(128)]
    return [
        TokenRow(str(i), [rng.randrange(5, num_tokens) for _ in range(n)], [True] * n)
        for i, n in enumerate(lengths)
    ]


def batches(found: list[TokenRow]) -> dict[str, list[Batch]]:
    """Every microbatch of the steps, either way."""
    data = in_order([found], CONFIG, seed=0, weights=None)
    size, count = CONFIG.rows_per_step // CONFIG.microbatches, CONFIG.microbatches
    pad = DataCollatorForLanguageModeling(pad_token_id=0)
    lay = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    items = list(data)
    padded = [pad(items[i : i + size]) for i in range(0, len(items), size)]
    together = packed(data, rows_per_step=CONFIG.rows_per_step, packs_per_step=count)
    return {"padded": padded, "packed": [lay([pack]) for pack in together]}


def seconds(model: Any, microbatches: list[Batch]) -> float:
    """Of the processor, to read them all and form the gradients."""
    start = time.process_time()
    for batch in microbatches:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    return time.process_time() - start


def measure(model: Any, ways: dict[str, list[Batch]]) -> measured.Json:
    model.train()
    for microbatches in ways.values():
        seconds(model, microbatches[:2])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, microbatches in ways.items():
            times[name].append(seconds(model, microbatches))
    pairs = zip(times["padded"], times["packed"], strict=True)
    return {**times, "ratio": median(padded / together for padded, together in pairs)}


def llama(num_tokens: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=num_tokens, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, head_dim=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def page(data: measured.Json) -> str:
    lines = [
        f"| {name} | {median(found['padded']):.2f} | {median(found['packed']):.2f} | "
        f"{found['ratio']:.2f} |"
        for name, found in data["models"].items()
    ]
    return "\n".join([
        "# What packing saves\n",
        f"128 rows, a median of 60 tokens, the longest {data['longest']}, in 4 steps of 32 rows, "
        f"8 at a time and sorted by length within a step: padding is {data['padding']:.0%} of the "
        "padded batches. Processor seconds to read all rows and form the gradients, medians of "
        f"{ROUNDS} rounds in turns; the ratio is the median of the rounds'.\n",
        "| model | padded | packed | padded / packed |\n|---|---|---|---|",
        *lines,
        f"\nV4 computes no padding either way.\n\n{measured.place(data['machine'])}.\n"
        "`benchmarks/packing.py` writes this page.\n",
    ])  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    found = rows(len(tokenizer))
    ways = batches(found)
    real = sum(int(batch["attention_mask"].sum()) for batch in ways["padded"])
    models = {
        "V4, tiny": new_model("tiny", tokenizer, seed=0),
        "Llama, sdpa": llama(len(tokenizer)),
    }
    data = {
        "machine": measured.machine("torch", "transformers", "trl"),
        "longest": max(len(row.tokens) for row in found),
        "padding": 1 - real / sum(batch["input_ids"].numel() for batch in ways["padded"]),
        "models": {name: measure(model, ways) for name, model in models.items()},
    }
    measured.write(PAGE, data, page)


if __name__ == "__main__":
    main()
