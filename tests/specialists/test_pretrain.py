from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.checkpoints import load_model, load_tokenizer, weights_hash
from posttrain.config import OptimizerConfig
from posttrain.domains import DataConfig, DomainSpec, is_heldout, load_rows
from posttrain.errors import CheckpointError, DataError
from posttrain.job import Job
from specialists import pretrain
from specialists.config import ExistingStage, MixtureConfig, PretrainConfig, PretrainStage

NewJob = Callable[..., Job]


def stage(domains: list[DomainSpec], *sources: MixtureConfig) -> PretrainStage:
    training = PretrainConfig(
        num_steps=2,
        rows_per_step=4,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        mixture=list(sources),
    )
    return PretrainStage(preset="tiny", pretrain=training, domains=domains)


def test_no_prompt_that_a_domain_holds_out_is_learned(words: DomainSpec, new_job: NewJob) -> None:
    job, other = new_job("base"), words.model_copy(update={"heldout_share": 0.4})
    source = MixtureConfig(data=words.data)
    rows = load_rows(words.data, folder=job.folder, seed=job.seed)
    kept, num_heldout = pretrain.without_heldout(source, [words, other], job)
    assert not any(is_heldout(row.messages, other.heldout_share) for row in kept)
    assert num_heldout == sum(is_heldout(row.messages, 0.4) for row in rows) > 0
    elsewhere = words.model_copy(update={"exclude_share": 0.4})
    assert pretrain.without_heldout(source, [elsewhere], job) == (kept, num_heldout)
    pretrain.check_disjoint(kept, [words, other], job)
    with pytest.raises(AssertionError, match="held-out prompts of 'words' are in the mixture"):
        pretrain.check_disjoint(rows, [words, other], job)


def test_a_source_of_heldout_prompts_only_is_refused(words: DomainSpec, new_job: NewJob) -> None:
    nearly_all = words.model_copy(update={"heldout_share": 1 - 1e-9})
    with pytest.raises(DataError, match=r"source jsonl words.jsonl has no row to learn"):
        pretrain.without_heldout(MixtureConfig(data=words.data), [nearly_all], new_job("base"))


def test_a_base_is_a_function_of_its_seed(words: DomainSpec, new_job: NewJob) -> None:
    config = stage([words], MixtureConfig(data=words.data, domain="words"))
    jobs = [new_job("one"), new_job("two")]
    for job in jobs:
        pretrain.work(config, job)
    one, two = (weights_hash(job.out / "checkpoint") for job in jobs)
    assert one == two
    assert jobs[0].metrics.records()[0]["rows_heldout"] > 0
    assert jobs[0].metrics.records()[-1]["step"] == 2


def test_a_source_may_leave_its_first_row_out(
    words: DomainSpec, recipe_folder: Path, new_job: NewJob
) -> None:
    first = load_rows(words.data, folder=recipe_folder, seed=0)[0].messages[0]["content"]
    text = f"def others(row):\n    return None if row['prompt'] == {first!r} else row\n"
    (recipe_folder / "but_the_first.py").write_text(text)
    data = words.data.model_copy(update={"convert": "but_the_first:others"})
    job = new_job("base")
    pretrain.work(stage([words], MixtureConfig(data=data)), job)
    assert (job.out / "checkpoint").exists()


def test_a_source_is_rendered_as_the_domain_it_names(words: DomainSpec) -> None:
    thinking = words.model_copy(update={"name": "words@high", "effort": "high", "system": "Think."})
    web = DataConfig(jsonl="web.jsonl")
    spec = pretrain.rendered_as(MixtureConfig(data=web, domain="words"), [thinking])
    assert (spec.system, spec.effort, spec.data.jsonl) == ("Think.", "high", "web.jsonl")
    plain = pretrain.rendered_as(MixtureConfig(data=web, effort="max"), [thinking])
    assert (plain.system, plain.effort) == (None, "max")


def test_an_existing_checkpoint_is_taken_as_it_is(start: Path, new_job: NewJob) -> None:
    job = new_job("base")
    pretrain.work_existing(ExistingStage(path=str(start / "checkpoint")), job)
    before, after = (load_model(f / "checkpoint").state_dict() for f in (start, job.out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    vocabularies: list[Any] = [
        load_tokenizer(f / "checkpoint").get_vocab() for f in (start, job.out)
    ]
    assert vocabularies[0] == vocabularies[1]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, new_job: NewJob) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint \(no config.json\)"):
        pretrain.work_existing(ExistingStage(path=str(tmp_path)), new_job("base"))
