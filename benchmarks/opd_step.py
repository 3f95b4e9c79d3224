"""A whole distillation step beside TRL's: `python benchmarks/opd_step.py`.

One teacher, the same student, prompts and lengths: 96 prompts of 16 tokens, 25 tokens sampled for
each at T = 1, the teacher's full-vocabulary reverse KL, one AdamW step. TRL's DistillationTrainer
(beta = 1) runs on the stock class and on ours; posttrain runs its engine, its teacher pool in this
process and its learner. fp32, one thread; every measurement is a process of its own; times are
medians over steps after the first, in seconds of processor time; memory is the peak above what the
process held once its models were built. All prompts are equally long, since stock transformers is
wrong under left padding.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measured import Json, forget_peak, machine, memory_mib, place, write
from transformers import TrainerCallback
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.tokenizer import build_tokenizer

VOCABULARIES = (275, 65536)
"""The quickstart's, and one whose head is most of the work."""
TARGETS = {275: 2.0, 65536: 3.0}
PEERS = ("posttrain", "TRL on the stock class", "TRL on ours")
ROWS, PROMPT, ANSWER = 96, 16, 25
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/opd-step.md"))
    parser.add_argument("--steps", type=int, default=5, help="steps of each, after the first")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=VOCABULARIES)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        peer, vocab_size, folder = arguments.worker
        found = measure(peer, int(vocab_size), Path(folder), arguments.steps)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    data: Json = machine("torch", "transformers", "trl")
    data["rows"] = others(arguments.page, arguments.vocabulary)
    when = {key: data[key] for key in ("date", "load")}
    for vocab_size in arguments.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            for seed, name in enumerate(("student", "teacher")):
                make(vocab_size, seed).save_pretrained(Path(folder) / name)
            for peer in PEERS:
                found = run_worker(peer, vocab_size, folder, arguments.steps)
                data["rows"].append({**found, **when})
                data["rows"].sort(key=lambda row: (row["vocabulary"], PEERS.index(row["peer"])))
                write(arguments.page, data, page)


def others(page: Path, measured: Sequence[int]) -> list[Json]:
    """The page's rows of vocabularies that are not measured now, with their own day and load."""
    path = page.with_suffix(".json")
    if not path.exists():
        return []
    before = json.loads(path.read_text("utf-8"))
    when = {key: before[key] for key in ("date", "load")}
    return [{**when, **row} for row in before["rows"] if row["vocabulary"] not in measured]


def run_worker(peer: str, vocab_size: int, folder: str, num_steps: int) -> Json:
    sys.stderr.write(f"V = {vocab_size}: {peer} ...\n")
    command = [sys.executable, __file__, "--steps", str(num_steps)]
    done = subprocess.run(
        [*command, "--worker", peer, str(vocab_size), folder],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"},  # CI: TRL reports no run to the hub
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def make(vocab_size: int, seed: int) -> V4ForCausalLM:
    config = preset_config(
        "tiny", vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    config.update({"indexer_loss_weight": 0.0, "balance_loss_weight": 0.0})  # stock has neither
    torch.manual_seed(seed)
    return V4ForCausalLM(config)


def prompts(vocab_size: int, num_steps: int) -> list[list[list[int]]]:
    """The prompts of each step; printable bytes, so that TRL's text of them has as many tokens."""
    tokenizer = build_tokenizer()
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz0123456789")["input_ids"]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(letters), (num_steps, ROWS, PROMPT), generator=generator)
    return [[[letters[i] for i in row] for row in step] for step in drawn.tolist()]


def measure(peer: str, vocab_size: int, folder: Path, num_steps: int) -> Json:
    """A row of the table."""
    steps = posttrain_steps if peer == PEERS[0] else trl_steps
    seconds: list[float] = []
    base = 0.0
    for before, after in steps(peer, vocab_size, folder, num_steps + 1):
        base = base or before["held_mib"]
        seconds.append(after["processor_s"] - before["processor_s"])
    peak = memory_mib("VmHWM") - base
    return {
        "vocabulary": vocab_size,
        "peer": peer,
        "processor_s": statistics.median(seconds[1:]),
        "peak_mib": peak,
    }


def now() -> Json:
    return {"processor_s": time.process_time(), "held_mib": memory_mib("VmRSS")}


def posttrain_steps(
    peer: str, vocab_size: int, folder: Path, num_steps: int
) -> Iterator[tuple[Json, Json]]:
    """Before and after each step of posttrain's."""
    from distill.hidden_store import HiddenStore
    from distill.learner import Learner
    from distill.rollouts import read_along
    from distill.teachers import Teacher, Teachers
    from posttrain.checkpoints import load_model
    from posttrain.job import LocalRole
    from posttrain.optim import build_optimizer
    from posttrain.rollout.engine import Engine
    from posttrain.rollout.types import Request

    model: Any = load_model(folder / "student")
    hidden_size = model.config.hidden_size
    teachers = Teachers(
        [LocalRole("distill.teachers:TeacherPool", {"capacity": 1})],
        lambda name: Teacher(name, folder / name, name, hidden_size),
        store=HiddenStore(folder / "hidden", memory_bytes=1 << 30),
        rows_per_batch=ROWS,
        timeout_s=600.0,
    )
    teachers.hire(["teacher"])
    teachers.head("teacher")
    learner = Learner(
        model,
        lambda student: build_optimizer(student, name="adamw", learning_rate=LEARNING_RATE),
        shares={"all": 1.0},
        head=teachers.head,
        rows_per_microbatch=ROWS,
    )
    engine = Engine(model, num_slots=ROWS, seed=0)
    forget_peak()
    for step, rows in enumerate(prompts(vocab_size, num_steps)):
        before = now()
        requests = [
            Request(f"{step}/{i}", ids, max_new_tokens=ANSWER, domain="all")
            for i, ids in enumerate(rows)
        ]
        mixtures = {"all": {"teacher": 1.0}}
        batch = read_along(engine.run(requests), requests, mixtures, teachers, step=step)
        scored = batch.rows()
        learner.step(scored)
        teachers.free(scored)
        yield before, now()


class Clock(TrainerCallback):
    """Before and after each of a Trainer's steps."""

    def __init__(self) -> None:
        self.marks: list[tuple[Json, Json]] = []
        self._before: Json = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        forget_peak()
        self._before = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        after = now()
        self.marks.append((self._before, after))
        self._before = after


def trl_steps(
    peer: str, vocab_size: int, folder: Path, num_steps: int
) -> Iterator[tuple[Json, Json]]:
    """Before and after each step of TRL's; a step begins where the one before ended, since its
    rollouts are sampled while the batch is prepared."""
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    model_class: Any = V4ForCausalLM if peer == PEERS[2] else DeepseekV4ForCausalLM
    student, teacher = (model_class.from_pretrained(folder / n) for n in ("student", "teacher"))
    tokenizer: Any = build_tokenizer()
    if vocab_size > len(tokenizer):
        tokenizer.add_tokens([f"<w{i}>" for i in range(vocab_size - len(tokenizer))])
    texts = [tokenizer.decode(ids) for step in prompts(vocab_size, num_steps) for ids in step]
    clock = Clock()
    trainer = DistillationTrainer(
        student,
        teacher_model=teacher.eval(),
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=ROWS,
            max_completion_length=ANSWER,
            generation_kwargs={"min_new_tokens": ANSWER},
            beta=1.0,
            learning_rate=LEARNING_RATE,
            max_steps=num_steps,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    yield from clock.marks


def page(data: Json) -> str:
    """The markdown page: where it was measured, and a table."""
    lines = [
        "# A distillation step beside TRL's",
        "",
        f"{place(data)}, fp32, tiny preset, {ROWS} rows of {PROMPT} + {ANSWER} tokens. Written by "
        "`benchmarks/opd_step.py`, which says how.",
        "",
        "| vocabulary | | day, load | processor s a step | times ours | target | peak MiB "
        "| times ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {row["vocabulary"]: row for row in data["rows"] if row["peer"] == PEERS[0]}
    for row in data["rows"]:
        base = ours[row["vocabulary"]]
        target = TARGETS.get(row["vocabulary"], 0.0) if row["peer"] == PEERS[1] else 0.0
        cells = [
            f"{row['vocabulary']:,}",
            row["peer"],
            f"{row['date']}, {row['load']}",
            f"{row['processor_s']:.2f}",
            f"{row['processor_s'] / base['processor_s']:.2f}",
            f"{target:g}" if target else "-",
            f"{row['peak_mib']:.0f}",
            f"{row['peak_mib'] / base['peak_mib']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
