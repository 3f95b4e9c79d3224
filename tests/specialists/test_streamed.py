"""Specialists of streamed data: the rows that a stage needs, of the same side, killed or not."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from stage_runs import check_killed

from posttrain.config import OptimizerConfig
from posttrain.domains import DataConfig, DomainSpec, load_rows, split
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.metrics import Metrics
from specialists import grpo, pretrain, sft
from specialists.config import GrpoConfig, GrpoStage, MixtureConfig, SftConfig, SftStage

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
BROKEN = 60
"""The lines that can be read."""


@pytest.fixture
def streamed(words: DomainSpec, recipe_folder: Path) -> DomainSpec:
    """The words, of which only the first may be read: behind them stands a line that is no row."""
    lines = (recipe_folder / "words.jsonl").read_text().splitlines()[:BROKEN]
    (recipe_folder / "stream.jsonl").write_text("\n".join([*lines, "no JSON"]))
    return words.model_copy(update={"data": DataConfig(jsonl="stream.jsonl", streaming=True)})


def train_ids(domain: DomainSpec, job: Job) -> list[str]:
    """The prompts to train on among the lines that can be read."""
    data = DataConfig(jsonl="stream.jsonl", limit=BROKEN)
    rows = load_rows(data, folder=job.folder, seed=0)
    return [row.id for row in split(rows, domain.heldout_share)[0]]


def sft_stage(domain: DomainSpec, **settings: Any) -> SftStage:
    defaults = {"num_steps": 5, "rows_per_step": 4, "optimizer": OPTIMIZER}
    return SftStage(domains=[domain], sft=SftConfig.model_validate({**defaults, **settings}))


def test_sft_reads_as_many_rows_as_it_learns(
    tokenizer: Any, streamed: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft")
    ids = train_ids(streamed, job)
    for settings, count in (
        ({}, 20),
        ({"num_demonstrations": 7}, 7),
        ({"validation_share": 0.5, "num_steps": 4}, 32),
    ):
        rows = sft.demonstrations(streamed, tokenizer, sft_stage(streamed, **settings).sft, job)
        assert {row.id for row in rows} == set(ids[:count])
    with pytest.raises(DataError, match="line 61: found 'no JSON'"):
        sft.demonstrations(streamed, tokenizer, sft_stage(streamed, num_steps=50).sft, job)


def test_grpo_reads_as_many_prompts_as_it_visits(
    start: Path, streamed: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": start})
    settings = {"num_steps": 2, "prompts_per_step": 3, "samples_per_prompt": 2}
    grpo.work(GrpoStage(domains=[streamed], grpo=GrpoConfig.model_validate(settings)), job)
    assert job.metrics.records()[0]["prompts/words"] == 6
    many = GrpoConfig.model_validate({**settings, "num_steps": 30})
    with pytest.raises(DataError, match="line 61: found 'no JSON'"):
        grpo.work(GrpoStage(domains=[streamed], grpo=many), new_job("many", {"start": start}))


def test_pretraining_reads_as_many_rows_as_it_learns_none_of_them_held_out(
    streamed: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("base")
    source = MixtureConfig(data=streamed.data)
    rows, num_dropped = pretrain.without_heldout(source, [streamed], job, most=30)
    assert len(rows) == 30
    assert num_dropped > 0
    assert {row.id for row in rows} <= set(train_ids(streamed, job))


def test_a_run_on_streamed_rows_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    streamed: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
) -> None:
    config = sft_stage(streamed, checkpoint_every=2, validation_share=0.2, num_steps=6)
    straight, _ = check_killed(partial(sft.work, config), new_job, cut_after, start=start, last=3)
    assert json.loads((straight.out / "metrics.jsonl").read_text().splitlines()[0])["rows"] < 31
