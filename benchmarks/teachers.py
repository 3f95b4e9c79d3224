"""Many teachers through a pool that holds one: `python benchmarks/teachers.py`.

Checkpoints of the `small` preset, each of its own weights, lie in a temporary folder. Every
measurement is a process of its own, fp32, one thread; what the page cache has of the checkpoints
is dropped before it. One question a teacher, of --tokens tokens in rows of 256, every position
kept; hidden states go to a store on disk and are freed after each answer. The same number of tokens
is asked of two teachers that both stay in memory.

Memory is the peak, sampled every 5 ms, of what the process holds itself (RssAnon) and of all that
is resident, pages of mapped files included, each less what it was before the first question.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from measured import Json, machine, memory_mib, place, write

from distill.batch import Example
from distill.hidden_store import HiddenStore
from distill.teacher_rows import Row, cut, deal
from distill.teachers import TOKENS_PER_BATCH, Teacher, TeacherPool, Teachers
from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.job import LocalRole

VOCAB = 512
ROW_TOKENS = 256
ROWS_PER_BATCH = 16
SAMPLE_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teachers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384, help="a teacher")
    parser.add_argument("--page", type=Path, default=Path("docs/teachers-pool.md"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        what, *words = arguments.measure.split(",")
        sys.stdout.write(json.dumps(MEASUREMENTS[what](*words)) + "\n")
        return
    data: Json = {**machine(), "teachers": arguments.teachers, "tokens": arguments.tokens}
    with tempfile.TemporaryDirectory() as folder:
        data["checkpoint_mib"] = make_checkpoints(Path(folder), arguments.teachers)
        for name, distinct, capacity in (
            ("two resident", 2, 2),
            ("pool of one", arguments.teachers, 1),
            ("two resident, again", 2, 2),
        ):
            words = ("pool", folder, distinct, capacity, arguments.teachers, arguments.tokens)
            (data[name],) = measured(folder, [words])
        data["workers"] = [
            {"workers": count, "ranks": measured(folder, workers(folder, count, arguments.tokens))}
            for count in (1, 2, 4)
        ]
    write(arguments.page, data, page)


def make_checkpoints(folder: Path, count: int) -> float:
    """`folder/0`, `folder/1`, ...; the size of one in MiB."""
    config = preset_config(
        "small", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    for number in range(count):
        torch.manual_seed(number)
        V4ForCausalLM(config).save_pretrained(folder / str(number))
    return (folder / "0" / "model.safetensors").stat().st_size / 2**20


def workers(folder: str, count: int, tokens: int) -> list[tuple[object, ...]]:
    """What each of so many workers is to do."""
    meeting = Path(folder) / f"meeting-{count}"
    return [("worker", folder, rank, count, meeting, tokens) for rank in range(count)]


def measured(folder: str, measurements: list[tuple[object, ...]]) -> list[Json]:
    """Each in a process of its own, side by side, from a disk that nothing was read from."""
    for path in Path(folder).glob("*/model.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--measure", ",".join(map(str, words))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for words in measurements
    ]
    answers = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), answers
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def rows_of(number: int, tokens: int) -> list[list[int]]:
    """The rows of a question."""
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randint(3, VOCAB, (ROW_TOKENS,), generator=generator).tolist()
        for _ in range(tokens // ROW_TOKENS)
    ]


def measure_pool(folder: str, distinct: str, capacity: str, questions: str, tokens: str) -> Json:
    """One worker, `questions` questions to `distinct` teachers in turn."""
    names = [str(number % int(distinct)) for number in range(int(questions))]
    role = LocalRole("distill.teachers:TeacherPool", {"capacity": int(capacity), "device": "cpu"})
    with tempfile.TemporaryDirectory() as place_of_rows:
        store = HiddenStore(Path(place_of_rows), memory_bytes=0)
        teachers = Teachers(
            [role],
            lambda name: Teacher(name, Path(folder) / name, name, hidden_size=384),
            store=store,
            rows_per_batch=ROWS_PER_BATCH,
            timeout_s=3600.0,
        )
        teachers.hire(names)
        with watched() as found:
            for number, name in enumerate(names):
                examples = [
                    Example(
                        "d",
                        {name: 1.0},
                        ids,
                        list(range(ROW_TOKENS)),
                        [3] * ROW_TOKENS,
                        [0.0] * ROW_TOKENS,
                    )
                    for ids in rows_of(number, int(tokens))
                ]
                then = names[number + 1] if number + 1 < len(names) else None
                teachers.free(teachers.ask(examples, then=then)())
        store.close()
    return found


def measure_worker(folder: str, rank: str, count: str, meeting: str, tokens: str) -> Json:
    """One worker of several that share one teacher, which it has read already."""
    place: Json = {"rank": int(rank), "num_workers": int(count), "meeting": Path(meeting)}
    pool = TeacherPool(device="cpu", timeout_s=600.0, **place)
    batches = [
        cut(
            [Row(ids, [0], "") for ids in rows_of(number, amount)],
            num_rows=ROWS_PER_BATCH,
            num_tokens=TOKENS_PER_BATCH,
        )
        for number, amount in ((0, ROW_TOKENS), (1, 4 * int(tokens)))
    ]
    first, rest = (deal(f"{folder}/0", b, int(count))[int(rank)] for b in batches)
    pool.score([first])
    with watched() as found:
        pool.score([rest])
    if int(count) > 1:
        torch.distributed.destroy_process_group()
    return {**found, "tokens": 4 * int(tokens)}


@contextmanager
def watched() -> Generator[Json]:
    """Filled at the end: seconds, and memory above what it was."""
    found: Json = {}
    before = memory_mib("RssAnon"), memory_mib("VmRSS")
    peaks, is_over = list(before), threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_S):
            for i, field in enumerate(("RssAnon", "VmRSS")):
                peaks[i] = max(peaks[i], memory_mib(field))

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter(), time.process_time()
    yield found
    found["wall_s"] = time.perf_counter() - start[0]
    found["processor_s"] = time.process_time() - start[1]
    is_over.set()
    thread.join()
    found["anonymous_mib"], found["resident_mib"] = (
        peak - at_first for peak, at_first in zip(peaks, before, strict=True)
    )


MEASUREMENTS = {"pool": measure_pool, "worker": measure_worker}


def page(data: Json) -> str:
    """The markdown page."""
    total = data["teachers"] * data["tokens"]
    pool = data["pool of one"]
    resident = [data["two resident"], data["two resident, again"]]

    def against(field: str) -> str:
        return f"{pool[field] * len(resident) / sum(row[field] for row in resident):.2f}"

    lines = [
        "# A pool that holds one teacher",
        "",
        f"{place(data)}, load {data['load']} at the start, fp32, `small` preset with a vocabulary "
        f"of {VOCAB} ({data['checkpoint_mib']:.0f} MiB a teacher). Written by "
        "`benchmarks/teachers.py`, which says how.",
        "",
        f"{data['teachers']} teachers, {data['tokens']:,} tokens each, {total:,} in all; beside "
        "them as many tokens of two teachers that both stay in memory, measured before and after.",
        "",
        "| | wall s | processor s | peak MiB, own | peak MiB, resident |",
        "|---|---|---|---|---|",
    ]
    for name in ("two resident", "pool of one", "two resident, again"):
        row = data[name]
        cells = [f"{row[field]:.1f}" for field in ("wall_s", "processor_s")]
        cells += [f"{row[field]:.0f}" for field in ("anonymous_mib", "resident_mib")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        f"| pool of one over the mean of two resident | {against('wall_s')} "
        f"| {against('processor_s')} | {against('anonymous_mib')} | {against('resident_mib')} |",
        "",
        "Workers that share one teacher's weights, already read (FSDP2 over gloo, "
        f"{data['workers'][0]['ranks'][0]['tokens']:,} tokens, this machine's {data['cores']} "
        "cores for all of them and whatever else ran):",
        "",
        "| workers | tokens/s, wall | tokens a processor second | peak MiB a worker, own |",
        "|---|---|---|---|",
    ]
    for row in data["workers"]:
        ranks = row["ranks"]
        tokens = ranks[0]["tokens"]
        cells = [
            str(row["workers"]),
            f"{tokens / max(rank['wall_s'] for rank in ranks):,.0f}",
            f"{tokens / sum(rank['processor_s'] for rank in ranks):,.0f}",
            f"{max(rank['anonymous_mib'] for rank in ranks):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
