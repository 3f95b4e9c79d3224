"""A domain of several sources: as much of each is learned and visited as its weight says."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.checkpoints import load_model
from posttrain.domains import (
    DataConfig,
    DomainSpec,
    Need,
    Row,
    fingerprint,
    load_rows,
    load_sides,
)
from posttrain.domains.mixing import mixed
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task
from specialists import grpo, sft
from specialists.config import GrpoConfig, MixtureConfig, SftConfig, SftStage
from specialists.groups import GroupSampler

NewJob = Callable[..., Job]
SIZES = {"few": 12, "some": 40, "many": 200}
WEIGHTS = {"few": 2.0, "some": 1.0, "many": 5.0}


@pytest.fixture
def blend(words: DomainSpec, recipe_folder: Path) -> DomainSpec:
    """Three files of different sizes, the smallest of which counts more than the next."""
    for name, size in SIZES.items():
        rows = [{"prompt": f"{name} {i}", "response": f"{i}"} for i in range(size)]
        (recipe_folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = [{"jsonl": f"{name}.jsonl", "weight": weight} for name, weight in WEIGHTS.items()]
    data = DataConfig.model_validate({"mixture": parts})
    return words.model_copy(update={"data": data})


def name_of(row: Row) -> str:
    return str(row.messages[-1]["content"]).split()[0]


def numbered(name: str, count: int) -> list[Row]:
    return [Row(f"{name}{i}", [{"role": "user", "content": f"{name} {i}"}]) for i in range(count)]


def test_rows_come_by_weight_and_none_is_lost() -> None:
    parts = [numbered("a", 30), numbered("b", 300), numbered("c", 5)]
    rows = list(mixed([iter(part) for part in parts], [3.0, 1.0, 2.0]))
    assert Counter(row.source for row in rows) == {0: 30, 1: 300, 2: 5}
    for number, part in enumerate(parts):  # each in its own order
        assert [row.id for row in rows if row.source == number] == [row.id for row in part]
    ends = 15  # until the first part ends, each has its share to within a row
    for count in range(1, ends):
        seen = Counter(row.source for row in rows[:count])
        for source, share in ((0, 1 / 2), (1, 1 / 6), (2, 1 / 3)):
            assert abs(seen[source] - share * count) <= 1
    after = [row.source for row in rows[20:40]]  # then the two that are left have 3 : 1
    assert 14 <= after.count(0) <= 16


def test_both_sides_have_every_source(blend: DomainSpec, recipe_folder: Path) -> None:
    whole = load_sides(blend, folder=recipe_folder, seed=0, need=None)
    for name, size in SIZES.items():
        alone = blend.model_copy(update={"data": DataConfig(jsonl=f"{name}.jsonl")})
        sides = load_sides(alone, folder=recipe_folder, seed=0, need=None)
        for both, one in zip(whole, sides, strict=True):
            assert [row.id for row in both if name_of(row) == name] == [row.id for row in one]
        assert sum(map(len, sides)) == size
    streamed = blend.model_copy(update={"data": blend.data.model_copy(update={"streaming": True})})
    train, _ = load_sides(streamed, folder=recipe_folder, seed=0, need=Need(num_train=32))
    assert [row.id for row in train] == [row.id for row in whole[0]][:32]
    assert Counter(map(name_of, train))["many"] == pytest.approx(20, abs=3)


def test_sft_learns_each_source_by_its_weight(
    tokenizer: Any, blend: DomainSpec, words: DomainSpec, new_job: NewJob
) -> None:
    config = SftConfig(num_steps=20, rows_per_step=16)
    domains, job = [blend, words.model_copy(update={"name": "other"})], new_job("sft")
    rows = {spec.name: sft.demonstrations(spec, tokenizer, config, job) for spec in domains}
    sources, weights = sft.by_source(domains, rows)
    assert weights == [2 / 8, 1 / 8, 5 / 8, 1.0]
    data = sft.in_order(list(sources.values()), config, seed=0, weights=weights)
    found: Counter[str] = Counter()
    for ids in data["input_ids"]:
        text = tokenizer.decode(ids)
        found[next((name for name in SIZES if f"{name} " in text), "other")] += 1
    assert found == {"few": 40, "some": 20, "many": 100, "other": 160}


def test_sft_on_a_mixture_trains_and_names_a_source_that_gives_nothing(
    start: Path, blend: DomainSpec, new_job: NewJob, recipe_folder: Path
) -> None:
    config = SftConfig(num_steps=2, rows_per_step=8, validation_share=0.2)
    job = new_job("sft", {"start": start})
    sft.work(SftStage(domains=[blend], sft=config), job)
    assert (job.out / "checkpoint").exists()
    (recipe_folder / "some.jsonl").write_text('{"prompt": "some 1"}\n{"prompt": "some 2"}\n')
    with pytest.raises(DataError, match=r"part 1 of its mixture, jsonl some\.jsonl, gave no row"):
        sft.work(SftStage(domains=[blend], sft=config), new_job("none", {"start": start}))


def test_grpo_visits_each_source_by_its_weight(
    tokenizer: Any, blend: DomainSpec, words: DomainSpec, recipe_folder: Path
) -> None:
    config = GrpoConfig(num_steps=20, prompts_per_step=16)
    other = words.model_copy(update={"name": "other"})
    tasks = [Task(spec, tokenizer, folder=recipe_folder, seed=0) for spec in (blend, other)]
    with closing(tasks[0]), closing(tasks[1]):
        order = grpo.prompt_order(tasks, config, seed=0)
    assert Counter(name_of(row) for task, row in order if task == 0) == {
        "few": 40, "some": 20, "many": 100,
    }  # fmt: skip
    assert sum(task == 1 for task, _ in order) == 160
    for step in range(20):  # every step has its share
        visited = order[16 * step : 16 * (step + 1)]
        assert abs(sum(task == 0 and name_of(row) == "many" for task, row in visited) - 5) <= 1


def test_a_prompt_makes_room_for_one_of_its_own_source(
    start: Path, tokenizer: Any, blend: DomainSpec, recipe_folder: Path
) -> None:
    config = GrpoConfig(num_steps=1, prompts_per_step=16, samples_per_prompt=2)
    with closing(Task(blend, tokenizer, folder=recipe_folder, seed=0)) as task:
        source_of = {row.id: row.source for row in task.train}
        order = grpo.prompt_order([task], config, seed=0)
        engine = Engine(load_model(start / "checkpoint"), num_slots=32, seed=0)
        sampler = GroupSampler(engine, [task], order, config=config, seed=0)
        groups = sampler.sample(range(16), attempt=1)
    found = [source_of[group[0].prompt_id] for group in groups]
    assert found == [row.source for _, row in order]
    assert [group[0].prompt_id for group in groups] != [row.id for _, row in order]


def test_a_file_of_a_mixture_decides_its_fingerprint(
    blend: DomainSpec, recipe_folder: Path
) -> None:
    before = fingerprint(blend.data, recipe_folder)
    assert fingerprint(blend.data, recipe_folder) == before
    with (recipe_folder / "some.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    assert fingerprint(blend.data, recipe_folder) != before
    assert len(load_rows(blend.data, folder=recipe_folder, seed=0)) == sum(SIZES.values()) + 1


def test_what_a_mixture_cannot_say_is_refused() -> None:
    part = {"jsonl": "a.jsonl"}
    for settings, message in (
        ({"mixture": [part], "jsonl": "b.jsonl"}, "found jsonl and mixture: keep one"),
        ({"mixture": [part], "limit": 3}, "limit is a part's: move it into the mixture's sources"),
        ({"mixture": [{**part, "streaming": True}]}, "streaming is the whole mixture's"),
        ({"mixture": [{**part, "weight": 0}]}, "greater than 0"),
        ({"mixture": [{"mixture": [part]}]}, "mixture"),
        ({"mixture": []}, "at least 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataConfig.model_validate(settings)
    with pytest.raises(ValidationError, match="data has a mixture of its own"):
        MixtureConfig.model_validate({"data": {"mixture": [part]}})
