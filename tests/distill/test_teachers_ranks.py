"""Workers that share a teacher's weights say what one worker says, to the bit."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_teachers_adapters import KINDS, write_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from distill.teacher_rows import Row, cut, deal
from posttrain.checkpoints import save_checkpoint
from posttrain.sharded import shard_of
from posttrain.tokenizer import build_tokenizer

DTYPES = ("float32", "bfloat16")
RANK = Path(__file__).with_name("teacher_rank.py")


def batches(count: int) -> list[list[Row]]:
    """Rows of 1 to 20 tokens, three a batch."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 21, (count,), generator=generator).tolist()
    rows = [
        Row(torch.randint(3, 200, (n,), generator=generator).tolist(), sorted({0, n - 1}), "")
        for n in lengths
    ]
    return cut(rows, num_rows=3, num_tokens=1000)


Questions = list[tuple[Path, list[list[Row]]]]


def ask(
    num_workers: int, teachers: Questions, folder: Path
) -> dict[str, tuple[list[list[Any]], list[int]]]:
    """By dtype all answers, batch by batch for each question and the first one again, and how many
    numbers each rank holds."""
    folder.mkdir()
    dealt = [deal(str(path), batches, num_workers) for path, batches in teachers]
    readings = [[reading[rank] for reading in dealt] for rank in range(num_workers)]
    pools: list[Any] = []
    for dtype in DTYPES:
        place = {"num_workers": num_workers, "meeting": folder / f"meeting-{dtype}"}
        pools.append(({"dtype": dtype, "capacity": 1, **place}, readings))
    (folder / "question").write_bytes(pickle.dumps(pools))
    answers = run(num_workers, folder)
    found: dict[str, tuple[list[list[Any]], list[int]]] = {}
    for pool, dtype in enumerate(DTYPES):
        merged: list[list[Any]] = []
        for number, (_, batches) in enumerate([*teachers, teachers[0]]):
            arrays = [iter(answer[pool][0][number]) for answer in answers]
            rows = [(i % num_workers, row) for i, batch in enumerate(batches) for row in batch]
            merged.append([next(arrays[rank]) for rank, _ in rows])
        found[dtype] = merged, [answer[pool][1] for answer in answers]
    return found


def run(num_workers: int, folder: Path) -> list[Any]:
    """Each worker's answer."""
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, folder / "question", str(rank), folder / f"answer-{rank}"],
            env={**os.environ, "PYTHONPATH": str(RANK.parents[2])},
        )
        for rank in range(num_workers)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * num_workers
    finally:
        for rank in ranks:
            rank.kill()
    return [pickle.loads((folder / f"answer-{r}").read_bytes()) for r in range(num_workers)]


@pytest.mark.slow
def test_two_workers_answer_what_one_answers_to_the_bit(
    stages: dict[str, Path], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=275, **sizes))
    save_checkpoint(llama, build_tokenizer(), tmp_path / "llama")
    base = stages["base"] / "checkpoint"
    adapters = [write_adapter(base, tmp_path / name, **kind) for name, kind in KINDS.items()]
    # 3, 1 and 2 batches: the second worker has nothing to read in the last round of two teachers
    teachers = [
        (stages["specialist/code"] / "checkpoint", batches(9)),
        (tmp_path / "llama", batches(2)),
        (base, batches(4)),
        *((adapter, batches(4)) for adapter in adapters),
    ]
    one, two = ask(1, teachers, tmp_path / "one"), ask(2, teachers, tmp_path / "two")
    for dtype in DTYPES:
        (alone, whole), (together, parts) = one[dtype], two[dtype]
        assert [len(rows) for rows in alone] == [9, 2, 4, 4, 4, 4, 9]
        assert len({rows[0].tobytes() for rows in alone[2:6]}) == 4  # each adapter says its own
        for rows, others in zip(alone, together, strict=True):
            assert all((a == b).all() for a, b in zip(rows, others, strict=True))
        assert sum(parts) == whole[0]  # each rank holds its rows and nothing else
        assert max(parts) < 0.6 * whole[0]


def test_ranks_hold_the_rows_that_torch_gives_them() -> None:
    for num_rows in (1, 2, 5, 8, 9):
        for num_ranks in (1, 2, 3, 4):
            chunks = list(torch.arange(num_rows).chunk(num_ranks))
            chunks += [torch.arange(0)] * (num_ranks - len(chunks))  # torch leaves empty ones out
            for rank, chunk in enumerate(chunks):
                held = torch.arange(num_rows)[shard_of(num_rows, rank, num_ranks)]
                assert torch.equal(held, chunk)
