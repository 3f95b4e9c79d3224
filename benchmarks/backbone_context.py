"""One long prompt through a tiny V4: `python benchmarks/backbone_context.py --tokens 1048576`.

Prefills random tokens in chunks of 8,192, one thread, fp32, and notes at each of MARKS, and at the
end: seconds so far, the peak of resident memory since the mark before above that of the built
model, the cache's size
beside the formula (cache.cache_bytes), and the time of a decoded token there.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measured import Json, forget_peak, machine, memory_mib, place, write

from posttrain.backbone import V4Cache, V4ForCausalLM, preset_config
from posttrain.backbone.cache import cache_bytes

MARKS = (4096, 65536, 262144, 1048576)
CHUNK = 8192
DECODED = 25
"""Tokens decoded at a mark; their median time counts, and a copy of the cache takes them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--page", type=Path, default=Path("docs/backbone-context.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data: Json = {**machine(), "rows": []}
    for row in prefilled(arguments.tokens):
        data["rows"].append(row)
        write(arguments.page, data, page)


@torch.no_grad()
def prefilled(num_tokens: int) -> Iterator[Json]:
    """A row of the table at each mark."""
    config = preset_config("tiny", vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    model = V4ForCausalLM(config).eval()
    cache = V4Cache(config, 1, like=model.lm_head.weight)
    generator = torch.Generator().manual_seed(0)
    base, seconds, done = memory_mib("VmRSS"), (0.0, 0.0), 0
    for mark in (*(mark for mark in MARKS if mark < num_tokens), num_tokens):
        forget_peak()
        while done < mark:
            size = (min(CHUNK, mark - done),)
            ids = torch.randint(3, config.vocab_size, size, generator=generator).tolist()
            before = time.perf_counter(), time.process_time()
            model.model.extend([ids], cache, [0])
            after = time.perf_counter(), time.process_time()
            seconds = seconds[0] + after[0] - before[0], seconds[1] + after[1] - before[1]
            done += len(ids)
            sys.stderr.write(f"\r{done:,} of {num_tokens:,} tokens, {seconds[0]:.0f} s")
        yield {
            "tokens": done,
            "wall_s": seconds[0],
            "processor_s": seconds[1],
            "peak_mib": memory_mib("VmHWM") - base,
            "cache_bytes": cache.nbytes,
            "formula_bytes": cache_bytes(config, 1, cache.capacity, torch.float32),
            "capacity": cache.capacity,
            "decode_ms": decode_ms(model, copy.deepcopy(cache)),
        }
    sys.stderr.write("\n")


def decode_ms(model: Any, cache: V4Cache) -> float:
    """Median processor milliseconds of one token more."""
    found: list[float] = []
    for _ in range(DECODED):
        before = time.process_time()
        model.model.decode(torch.tensor([5]), cache, torch.ones(1, dtype=torch.long))
        found.append(1e3 * (time.process_time() - before))
    return statistics.median(found)


def page(data: Json) -> str:
    """The markdown page: where it was measured, and a table."""
    lines = [
        "# One long prompt",
        "",
        f"{place(data)}, load {data['load']} at the start, fp32, tiny preset, chunks of "
        f"{CHUNK:,} tokens. Written by "
        "`benchmarks/backbone_context.py`, which says how. The cache's room doubles when it is "
        "full.",
        "",
        "| tokens | prefill s | processor s | peak MiB | cache MiB | formula MiB | room for tokens "
        "| decoded token ms | over the first row's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = (
            f"{row['tokens']:,}",
            f"{row['wall_s']:.1f}",
            f"{row['processor_s']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['cache_bytes'] / 2**20:.2f}",
            f"{row['formula_bytes'] / 2**20:.2f}",
            f"{row['capacity']:,}",
            f"{row['decode_ms']:.2f}",
            f"{row['decode_ms'] / data['rows'][0]['decode_ms']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
