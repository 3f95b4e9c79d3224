"""Streamed data: as much of it as is needed, on the sides where the whole has it."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from posttrain.domains import DataConfig, DomainSpec, Need, Row, load_rows, load_sides, stream_rows
from posttrain.domains.sides import take
from posttrain.errors import DataError
from posttrain.pipeline.recipe import Recipe
from posttrain.tasks import Task
from posttrain.tokenizer import build_tokenizer

NUM_ROWS = 400


def rows_of(num_rows: int, *, size: int = 4) -> list[dict[str, Any]]:
    """Numbered prompts, some twice; three of four have a response."""
    rng = Random(num_rows)
    prompts = [f"{rng.randrange(num_rows)} " + "x" * size for _ in range(num_rows)]
    return [
        {"prompt": prompt, **({"response": prompt[::-1]} if i % 4 else {}), "answer": i}
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(params=["jsonl", "parquet", "hub", "python"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The same rows in every kind of source that can be streamed."""
    rows = rows_of(NUM_ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        return {"parquet": "rows.parquet"}
    if request.param == "hub":  # a folder is a data set of the datasets library too
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text(lines)
        return {"hub": str(tmp_path / "set")}
    (tmp_path / "rows.jsonl").write_text(lines)
    if request.param == "python":
        code = "import json\ndef rows(path):\n    yield from map(json.loads, open(path))\n"
        (tmp_path / "my_stream.py").write_text(code)
        path = str(tmp_path / "rows.jsonl")
        return {"python": "my_stream:rows", "args": {"path": path}}
    return {"jsonl": "rows.jsonl"}


def spec_of(data: dict[str, Any], **fields: Any) -> DomainSpec:
    return DomainSpec.model_validate({"name": "d", "data": data, "reward": "exact", **fields})


@pytest.mark.filterwarnings("ignore")  # datasets' own, of files it leaves open
def test_a_stage_gets_the_first_rows_of_each_side_as_the_whole_has_them(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    whole = load_sides(spec_of(data), folder=tmp_path, seed=0, need=Need(9, 9))
    assert len(whole[0]) > 200, "what is not streamed is read whole, whatever is needed"
    streamed = spec_of({**data, "streaming": True})
    everything = load_sides(streamed, folder=tmp_path, seed=0, need=None)
    assert [[row.id for row in side] for side in everything] == [
        [row.id for row in side] for side in whole
    ]
    for need in (Need(30, 5), Need(0, 7), Need(3, 0), Need(10_000, 10_000)):
        train, heldout = load_sides(streamed, folder=tmp_path, seed=0, need=need)
        assert [row.id for row in train] == [row.id for row in whole[0]][: need.num_train]
        assert [row.id for row in heldout] == [row.id for row in whole[1]][: need.num_heldout]


def test_only_answered_rows_count_where_answers_are_learned(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(NUM_ROWS))
    (tmp_path / "rows.jsonl").write_text(lines)
    streamed = spec_of({"jsonl": "rows.jsonl", "streaming": True})
    need = Need(num_train=50, is_answered=True)
    train, _ = load_sides(streamed, folder=tmp_path, seed=0, need=need)
    assert len(train) == 50
    assert all(row.response for row in train)


def numbered(count: int, read: list[int]) -> Iterator[Row]:
    """Rows that note that they were read."""
    for i in range(count):
        read.append(i)
        yield Row(str(i), [{"role": "user", "content": str(i)}])


@pytest.mark.parametrize("need", [Need(5, 0), Need(0, 3), Need(20, 4), Need(0, 0)])
def test_no_row_behind_the_last_one_needed_is_read(need: Need) -> None:
    read: list[int] = []
    train, heldout = take(numbered(10_000, read), need, heldout_share=0.25)
    assert (len(train), len(heldout)) == (need.num_train, need.num_heldout)
    taken = [int(row.id) for row in (*train, *heldout)]
    assert len(read) == max(taken, default=-1) + 1


def test_a_prompt_that_another_domain_may_hold_out_is_on_neither_side() -> None:
    rows = list(numbered(300, []))
    train, heldout = take(rows, Need(300, 300), heldout_share=0.2, untrained_share=0.6)
    assert 0 < len(train) < 180
    assert 0 < len(heldout) < 120
    assert not {row.id for row in train} & {row.id for row in heldout}
    more, _ = take(rows, Need(300, 300), heldout_share=0.2)
    assert {row.id for row in train} < {row.id for row in more}


def test_a_large_files_rows_are_not_all_held(tmp_path: Path) -> None:
    size = 4000
    with (tmp_path / "large.jsonl").open("w") as file:
        for row in rows_of(3000, size=size):
            file.write(json.dumps(row) + "\n")
    assert (tmp_path / "large.jsonl").stat().st_size > 16e6
    streamed = spec_of({"jsonl": "large.jsonl", "streaming": True}, heldout_share=0.05)
    tracemalloc.start()
    train, heldout = load_sides(streamed, folder=tmp_path, seed=0, need=Need(10, 60))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(train), len(heldout)) == (10, 60)
    assert peak < 2e6, "seventy rows of 8 KB are less than one megabyte"


def test_a_task_reads_what_its_stage_needs_and_a_bad_row_behind_it_never(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_of(NUM_ROWS)] + ["no JSON"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    spec = spec_of({"jsonl": "rows.jsonl", "streaming": True})
    task = Task(spec, build_tokenizer(), folder=tmp_path, seed=0, need=Need(40, 8))
    assert (len(task.train), len(task.heldout)) == (40, 8)
    with pytest.raises(DataError, match="line 401: found 'no JSON', which is no JSON"):
        Task(spec, build_tokenizer(), folder=tmp_path, seed=0, need=Need(10_000, 0))


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    config = DataConfig(jsonl="rows.jsonl", streaming=True)
    with pytest.raises(DataError, match="has no rows"):
        list(stream_rows(config, folder=tmp_path, seed=0))
    with pytest.raises(DataError, match="has no rows"):
        load_rows(config, folder=tmp_path, seed=0, most=3)


def test_what_needs_all_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="streaming is for jsonl, parquet, hub and python"):
        DataConfig(reasoning_gym={"task": "gcd"}, streaming=True)
    streamed = {"jsonl": "rows.jsonl", "streaming": True}
    with pytest.raises(ValidationError, match="decontaminate compares with every held-out prompt"):
        spec_of(streamed, decontaminate={})
    recipe: dict[str, Any] = {
        "name": "r", "base": {"path": "b"},
        "domains": {"d": {"data": streamed, "reward": "exact", "best_of": {"num_prompts": 9}}},
    }  # fmt: skip
    Recipe.model_validate(recipe)
    with pytest.raises(ValidationError, match="null is all prompts, and domain 'd' is streamed"):
        Recipe.model_validate({**recipe, "evaluate": {"num_prompts": None}})
    recipe["domains"]["d"]["best_of"] = {}
    with pytest.raises(ValidationError, match="null is all prompts, and domain 'd' is streamed"):
        Recipe.model_validate(recipe)
