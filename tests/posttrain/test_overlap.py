"""Prompts near a test's are found whatever their case and punctuation, and leave the training."""

import json
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.domains import (
    DataConfig,
    DomainSpec,
    Row,
    fingerprint,
    load_rows,
    near_duplicates,
    near_tests,
    overlap,
    overlaps,
    row_of,
)
from posttrain.domains.config import DecontaminateConfig
from posttrain.domains.overlap import grams
from posttrain.errors import DataError
from posttrain.tasks import Task
from posttrain.tokenizer import build_tokenizer


def row(text: str) -> Row:
    return row_of({"prompt": text}, where="here")


def words(rng: Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_the_overlap_is_that_of_the_definition(seed: int) -> None:
    rng = Random(seed)
    n = rng.randint(1, 5)
    pool = words(rng, 12)
    texts = [" ".join(rng.choices(pool, k=rng.randint(1, 14))) for _ in range(30)]
    train, tests = [row(t) for t in texts[:15]], [row(t) for t in texts[15:]]
    above = rng.random() * 0.8
    found = {
        o.row.id: (o.source, o.share)
        for o in overlaps(train, {"a": tests[:7], "b": tests[7:]}, num_words=n, above=above)
    }
    for one in train:
        shares = [
            len(grams(one, n) & grams(t, n)) / min(len(grams(one, n)), len(grams(t, n)))
            for t in tests
        ]
        if max(shares) > above:
            assert found[one.id][1] == pytest.approx(max(shares))
            sources = {"ab"[i >= 7] for i, share in enumerate(shares) if share == max(shares)}
            assert found[one.id][0] in sources
        else:
            assert one.id not in found


@pytest.mark.parametrize("seed", range(5))
def test_a_near_duplicate_is_that_of_the_definition(seed: int) -> None:
    rng = Random(seed)
    n, above = rng.randint(1, 3), rng.random() * 0.4
    pool = words(rng, 5)
    texts = {" ".join(rng.choices(pool, k=rng.randint(1, 12))): None for _ in range(40)}
    rows = [row(text) for text in texts]
    found = {o.row.id: o.share for o in near_duplicates(rows, num_words=n, above=above)}
    assert len(found) > 2
    for number, one in enumerate(rows):
        mine = grams(one, n)
        others = [grams(other, n) for other in rows[:number]]
        share = max((len(mine & t) / min(len(mine), len(t)) for t in others), default=0.0)
        assert found.get(one.id, 0.0) == pytest.approx(share if share > above else 0.0)


def test_what_all_rows_say_does_not_compare_each_with_all() -> None:
    rng = Random(0)
    head = " ".join(words(rng, 20))
    rows = [row(f"{head} {' '.join(words(rng, 60))}") for _ in range(400)]
    copy = row(f"{rows[399].messages[0]['content']} more")
    found = near_duplicates([*rows, copy], num_words=8, above=0.5)
    assert [(o.row.id, o.other.id) for o in found] == [(copy.id, rows[399].id)]


def test_case_and_punctuation_do_not_count_and_numbers_do() -> None:
    tests = {"test": [row("Tom has 5 apples; he eats 2. How many are left?")]}

    def is_near(text: str) -> bool:
        return bool(overlaps([row(text)], tests, num_words=4, above=0.5))

    assert is_near("TOM has 5 apples - he eats 2! How many are left")
    assert is_near("Solve it. Tom has 5 apples; he eats 2. How many are left? Be brief.")
    assert not is_near("Tom has 7 pears; she eats 3. How few remain?")
    assert not is_near("How many are left?") or grams(row("How many are left?"), 4) <= grams(
        tests["test"][0], 4
    )


def spec_of(**fields: Any) -> DomainSpec:
    data = {"name": "d", "data": {"jsonl": "rows.jsonl"}, "reward": "exact", **fields}
    return DomainSpec.model_validate(data)


def test_prompts_near_a_tests_are_not_trained_on(tmp_path: Path) -> None:
    rng = Random(0)
    texts = [" ".join(words(rng, 12)) for _ in range(60)]
    near = [f"{text} {' '.join(words(rng, 3))}" for text in texts[:30]]  # some of held-out ones
    lines = [json.dumps({"prompt": text, "answer": "1"}) for text in texts + near]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": texts[40].upper() + "?"}))
    tokenizer = build_tokenizer()

    def task(**fields: Any) -> Task:
        return Task(spec_of(**fields), tokenizer, folder=tmp_path, seed=0)

    settings = {"num_words": 4, "against": {"test": {"jsonl": "test.jsonl"}}}
    with closing(task()) as plain, closing(task(decontaminate=settings)) as clean:
        assert not plain.contaminated
        gone = {r.id for r in plain.train} - {r.id for r in clean.train}
        assert gone == {o.row.id for o in clean.contaminated}
        assert clean.heldout == plain.heldout
        heldout = {r.messages[0]["content"] for r in plain.heldout}
        wanted = {
            r.id
            for r in plain.train
            for text in [r.messages[0]["content"]]
            if text == texts[40] or any(text.startswith(h) or h.startswith(text) for h in heldout)
        }
        assert gone == wanted
        assert len(gone) > 2
        assert {o.source for o in clean.contaminated} == {"held out", "test"}


def test_what_was_left_out_is_told_with_both_texts_cut(tmp_path: Path) -> None:
    rng = Random(3)
    long = " ".join(words(rng, 60))
    part = " ".join([*long.split()[:45], *words(rng, 15)])  # 42 of 57 runs
    train, heldout = [row(part), row(long), row("one two three four")], [row(f"{long} more")]
    config = DecontaminateConfig(num_words=4)
    found = near_tests(config, train, heldout, folder=tmp_path, seed=0)
    for _ in range(2):  # a stage that goes on tells it again
        overlap.tell(found, tmp_path, domain="d", num_train=3, config=config)
        told = overlap.told(tmp_path)["d"]
        assert (told["num_train"], told["num_left_out"]) == (3, 2)
        pair, second = told["pairs"]
        assert (second["train_id"], second["share"]) == (train[0].id, round(42 / 57, 4))
        assert (pair["train_id"], pair["test_id"]) == (train[1].id, heldout[0].id)
        assert (pair["share"], pair["source"]) == (1.0, "held out")
        assert long.startswith(pair["train"].removesuffix("..."))
        assert len(pair["train"]) == len(pair["test"]) == overlap.SHOWN
    assert [path.name for path in (tmp_path / overlap.FOLDER).iterdir()] == ["d.json"]
    assert overlap.counts(tmp_path) == {"contaminated/d": 2.0}
    assert overlap.told(tmp_path / "elsewhere") == {}


def test_a_parquet_file_gives_the_rows_that_its_jsonl_gives(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} + 1 =", "answer": i + 1, "response": None if i % 3 else str(i + 1)}
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = [json.dumps({k: v for k, v in r.items() if v is not None}) + "\n" for r in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    parquet, jsonl = DataConfig(parquet="rows.parquet"), DataConfig(jsonl="rows.jsonl")
    found = load_rows(parquet, folder=tmp_path, seed=0)
    assert found == load_rows(jsonl, folder=tmp_path, seed=0)
    before = fingerprint(parquet, tmp_path)
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "rows.parquet")
    assert fingerprint(parquet, tmp_path) != before
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match=r"rows\.parquet is no whole Parquet file"):
        load_rows(parquet, folder=tmp_path, seed=0)
    with pytest.raises(DataError, match=r"did you mean rows\.parquet"):
        load_rows(DataConfig(parquet="row.parquet"), folder=tmp_path, seed=0)
