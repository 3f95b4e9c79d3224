"""V4ForCausalLM against stock transformers, in one run: `python benchmarks/backbone.py`.

Both have the same weights; fp32, one thread. Every measurement is a process of its own. Times are
medians of interleaved repeats, in seconds of processor time (of the process, so that a busy
machine disturbs them less) and of the wall clock; memory is the peak above what the process held
once the model was built and had taken a step of a few tokens, which loads what a process loads once
(numba and its loops: some 110 MiB). The indexer's loss is off, since stock has none.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any
from unittest.mock import patch

import torch
from measured import Json, forget_peak, machine, memory_mib, place, write
from shapes import LONG
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4Cache, V4ForCausalLM, preset_config
from posttrain.backbone.fake_quant import PARTS
from posttrain.backbone.feed import Ahead, weights_for_loops
from posttrain.backbone.presets import PRESETS
from posttrain.tokenizer import build_tokenizer

Step = Callable[[], object]
DECODED_LENGTHS = (16, 80)
"""Prompts of the decoded rows are spread evenly from the one to the other."""


@dataclass(frozen=True)
class Row:
    """`Row("train", 64, 32)`: forward and backward of 64 rows of 32 tokens."""

    kind: str
    """"train", "decode" (eager), "ahead" (steps of the same rows, in numba's loops) or "compiled"
    (the step as torch's one graph)."""
    rows: int
    tokens: int
    is_long: bool = False
    """The "long" preset."""
    recomputes: bool = False
    """Each layer of ours is computed again in the backward."""
    learns_index: bool = False
    """The indexer's own loss is on, which stock does not have."""
    has_stock: bool = True
    repeats: int = 9
    target: float = 0.0
    """Ours is to be at least so many times as fast as stock."""

    @property
    def name(self) -> str:
        what = {
            "train": "forward + backward",
            "decode": "decode step, eager",
            "ahead": "decode step, one of several in loops",
            "compiled": "decode step, compiled by torch",
        }[self.kind]
        if self.kind != "train":
            return f"{what}, {self.rows} rows"
        again = ", layers computed again" if self.recomputes else ""
        more = ", the indexer learning" if self.learns_index else ""
        return f"{what}, {self.rows} x {self.tokens:,}{again}{more}"


ROWS = (
    Row("train", 64, 32, target=2.3),
    Row("train", 16, 128, target=2.3),
    Row("decode", 64, 1, repeats=31, target=2.0),
    Row("ahead", 64, 1, repeats=31, target=5.0),
    Row("train", 1, 4096, is_long=True, repeats=3, target=10.0),
    Row("train", 1, 8192, is_long=True, repeats=1, target=18.0),
    Row("train", 1, 8192, is_long=True, recomputes=True, has_stock=False, repeats=1),
    Row("train", 1, 8192, is_long=True, learns_index=True, has_stock=False, repeats=1),
)
COMPILED_ROWS = (Row("compiled", 64, 1, repeats=31, target=5.0),)
LONG_ROWS = tuple(
    Row("train", 1, tokens, is_long=True, recomputes=True, has_stock=False, repeats=1)
    for tokens in (16384, 32768, 65536)
)


def main() -> None:
    arguments = parse()
    if arguments.worker:
        torch.set_num_threads(1)
        row, what = Row(**json.loads(arguments.worker[0])), arguments.worker[1]
        found = times(row) if what == "times" else {"peak_mib": peak_mib(row, what)}
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows = (
        *ROWS,
        *(COMPILED_ROWS if arguments.compiled else ()),
        *(LONG_ROWS if arguments.long else ()),
    )
    data: Json = {**machine(), "rows": []}
    numbers = arguments.page.with_suffix(".json")
    if arguments.only and numbers.exists():
        older = json.loads(numbers.read_text("utf-8"))
        data["rows"] = [{"date": older["date"], **row} for row in older["rows"]]
    for row in rows:
        if arguments.only and arguments.only not in row.name:
            continue
        if row.tokens > arguments.stock_up_to:
            row = replace(row, has_stock=False)
        put(data["rows"], {"date": data["date"], **measure(row)})
        write(arguments.page, data, page)


def put(rows: list[Json], found: Json) -> None:
    """In the place of the row of that name, if there is one."""
    names = [row["name"] for row in rows]
    at = names.index(found["name"]) if found["name"] in names else len(rows)
    rows[at : at + 1] = [found]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/backbone-speed.md"))
    parser.add_argument("--long", action="store_true", help="also ours alone at 16k to 64k tokens")
    parser.add_argument("--compiled", action="store_true", help="also the compiled decode step")
    parser.add_argument("--only", default="", help="measure the rows with this in their name alone")
    parser.add_argument(
        "--stock-up-to",
        type=int,
        default=8192,
        help="leave stock out above so many tokens: at 8,192 it takes 12 GiB and minutes",
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(row: Row) -> Json:
    """One row of the table: times in one process, then each model's peak in its own."""
    load = round(os.getloadavg()[0], 1)
    found: Json = {**asdict(row), "name": row.name, "load": load, **run_worker(row, "times")}
    if row.kind == "train":
        models = ("ours", "quantised", *(("stock",) if row.has_stock else ()))
        found["peak_mib"] = {name: run_worker(row, name)["peak_mib"] for name in models}
    return found


def run_worker(row: Row, what: str) -> Json:
    """`times` of a row, or `peak_mib` of "ours" or "stock", in a process of its own."""
    started = time.monotonic()
    sys.stderr.write(f"{row.name}: {what} ...")
    sys.stderr.flush()
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(row)), what]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=True,
    )
    found: Json = json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(f" {time.monotonic() - started:.0f} s\n")
    return found


def times(row: Row) -> Json:
    """Median seconds a step of each model, repeats interleaved: {"processor_s": {"ours": ..}}."""
    steps = {name: build(row, name) for name in (("ours", "stock") if row.has_stock else ("ours",))}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(row.repeats + 1):
        for name, step in steps.items():
            before = time.process_time(), time.perf_counter()
            step()
            if repeat or row.repeats == 1:  # the first warms up; a single repeat is its own
                processor[name].append(time.process_time() - before[0])
                wall[name].append(time.perf_counter() - before[1])
        if row.repeats == 1:
            break
    return {
        "processor_s": {name: statistics.median(x) for name, x in processor.items()},
        "wall_s": {name: statistics.median(x) for name, x in wall.items()},
    }


def peak_mib(row: Row, name: str) -> float:
    """The peak of one step's resident memory above that of the model in use, MiB."""
    step = build(row, name)
    base = memory_mib("VmRSS")
    forget_peak()
    step()
    return memory_mib("VmHWM") - base


def build(row: Row, name: str) -> Step:
    """A step of "ours" or "stock" with the same weights and inputs: a function to call. A model
    that trains has taken a step of a few tokens."""
    tokenizer: Any = build_tokenizer()
    make_config: Any = preset_config
    with patch.dict(PRESETS, {"long": LONG}):  # known here alone
        config = make_config(
            "long" if row.is_long else "tiny",
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    config.update({"indexer_loss_weight": float(row.learns_index)})
    if name == "quantised":
        config.update({"fake_quantization": list(PARTS)})
    torch.manual_seed(0)
    theirs = copy.deepcopy(config)  # a model writes into its config, how experts run among it
    model: Any = V4ForCausalLM(config)
    if name == "stock":
        weights = model.state_dict()
        model = DeepseekV4ForCausalLM(theirs)
        model.load_state_dict(weights)
    elif row.recomputes:
        older = model.gradient_checkpointing_enable  # warns that it has a new name, where it has
        getattr(model, "activation_checkpointing_enable", older)()
    generator = torch.Generator().manual_seed(0)
    if row.kind == "train":
        ids = torch.randint(3, config.vocab_size, (row.rows, row.tokens), generator=generator)
        train_step(model.train(), ids[:1, :32])
        return lambda: train_step(model, ids)
    longest = DECODED_LENGTHS[1]
    ids = torch.randint(3, config.vocab_size, (row.rows, longest), generator=generator)
    if name == "stock":
        return stock_decode(model.eval(), ids, row.repeats)
    return our_decode(model.eval(), ids, row.kind, repeats=row.repeats)


def train_step(model: Any, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def our_decode(model: Any, ids: Tensor, kind: str, *, repeats: int) -> Step:
    """One token more in every row, rows of their own lengths: by `decode`, or by what the rollout
    engine takes for several steps of the same rows."""
    first, last = DECODED_LENGTHS
    lengths = torch.linspace(first, last, len(ids)).int().tolist()
    cache = V4Cache(model.config, len(ids), like=model.lm_head.weight)
    cache.reserve(last + repeats + 2)
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    model.model.prefill(prompts, cache, list(range(len(ids))))
    is_live_B, token_B = torch.ones(len(ids), dtype=torch.long), ids[:, -1]

    if kind == "ahead":
        weights = weights_for_loops(model.model)
        decode: Any = Ahead(model.model, weights, cache, range(len(ids)), repeats + 2).step
    else:
        whole = model.model.decode
        if kind == "compiled":
            from posttrain.backbone.compiled import compiled_decode  # starts a compiler

            whole = compiled_decode(model.model)
        decode = partial(whole, cache=cache, is_live_B=is_live_B)

    @torch.no_grad()
    def step() -> None:
        nonlocal token_B
        token_B = model.lm_head(decode(token_B)).argmax(-1)

    return step


def stock_decode(model: Any, ids: Tensor, repeats: int) -> Step:
    """One token more in every row by stock's greedy `generate`. All rows have the longest's length:
    stock is wrong on rows of their own lengths, which it would pad on the left."""
    turn, done = Semaphore(0), Semaphore(0)

    class Pause(StoppingCriteria):
        """Between two tokens `generate` waits for the next step."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            done.release()
            turn.acquire()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"max_new_tokens": repeats + 9, "do_sample": False, "eos_token_id": None}
    criteria = StoppingCriteriaList([Pause()])
    options |= {"stopping_criteria": criteria, "attention_mask": torch.ones_like(ids)}
    Thread(target=model.generate, args=(ids,), kwargs=options, daemon=True).start()
    done.acquire()

    def step() -> None:
        turn.release()
        done.acquire()

    return step


def page(data: Json) -> str:
    """The markdown page: where it was measured, and a table."""
    lines = [
        "# The backbone against stock transformers",
        "",
        f"{place(data)}, fp32, same weights. Written by `benchmarks/backbone.py`, which says how; "
        "ratios are of processor time; the load is the machine's when the row began. A decode step "
        "is eager where torch compiles nothing (numba does, host/), or one of several of the same "
        "rows as the rollout engine takes them (feed.py), or compiled by torch (compiled.py). The "
        "last two columns: ours with all of serving's rounding (fake_quant.py), and its memory "
        "over that without.",
        "",
        "| step | day | load | stock s | ours s | ratio | target | ours wall s | stock MiB "
        "| ours MiB | ratio | rounded MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(table_row(row) for row in data["rows"])]) + "\n"


def table_row(row: Json) -> str:
    seconds, peaks = row["processor_s"], row.get("peak_mib", {})
    return " | ".join(
        [
            f"| {row['name']}",
            row["date"],
            f"{row['load']:g}",
            number(seconds, "stock", ".4g"),
            number(seconds, "ours", ".4g"),
            ratio(seconds),
            f"{row['target']:g}" if row["target"] else "-",
            number(row["wall_s"], "ours", ".4g"),
            number(peaks, "stock", ".0f"),
            number(peaks, "ours", ".0f"),
            ratio(peaks),
            number(peaks, "quantised", ".0f"),
            f"{ratio(peaks, 'quantised', 'ours')} |",
        ]
    )


def number(values: Mapping[str, float], name: str, form: str) -> str:
    return format(values[name], form) if name in values else "-"


def ratio(values: Mapping[str, float], above: str = "stock", below: str = "ours") -> str:
    both = above in values and below in values
    return f"{values[above] / values[below]:.2f}" if both else "-"


if __name__ == "__main__":
    main()
