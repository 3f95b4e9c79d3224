"""No stage trains on a prompt near a test's, and each says beside its outputs which it left out."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec, is_heldout, overlap
from posttrain.job import Job
from specialists import best_of, grpo, sft
from specialists.config import BestOfConfig, BestOfStage, GrpoConfig, GrpoStage, SftConfig, SftStage

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def prompt(rng: Random) -> str:
    return " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7))


@pytest.fixture
def near(recipe_folder: Path) -> tuple[DomainSpec, set[str]]:
    """A domain with a word added to some of its held-out prompts and some others; and those of the
    longer ones that are trained on unless they are found."""
    rng = Random(1)
    texts = [prompt(rng) for _ in range(64)]
    texts += [f"{text} z" for text in texts]
    rows = [{"prompt": text, "response": text[:3], "answer": text[:3]} for text in texts]
    (recipe_folder / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DomainSpec.model_validate(
        {
            "name": "near",
            "data": {"jsonl": "near.jsonl"},
            "reward": "my_letters:share_of_a",
            "max_new_tokens": 4,
            "decontaminate": {"num_words": 4, "max_overlap": 0.5},
        }
    )
    held = {text for text in texts if is_heldout([{"role": "user", "content": text}], 0.125)}
    longer = ({f"{text} z" for text in held} & set(texts)) - held
    shorter = {text.removesuffix(" z") for text in held if text.endswith(" z")} - held
    assert len(longer | shorter) > 5
    return spec, longer | shorter


def check_told(out: Path, gone: set[str]) -> None:
    told = overlap.told(out)["near"]
    assert {pair["train"] for pair in told["pairs"]} == gone
    assert told["num_left_out"] == len(gone)
    assert all(pair["share"] > 0.5 for pair in told["pairs"])
    shares = [pair["share"] for pair in told["pairs"]]
    assert shares == sorted(shares, reverse=True)
    for pair in told["pairs"]:
        assert pair["train"] in f"{pair['test']} z" or pair["test"] in f"{pair['train']} z"
    assert [path.name for path in (out / overlap.FOLDER).iterdir()] == ["near.json"]


def num_clean(folder: Path, gone: set[str]) -> int:
    """Prompts that are neither held out nor near to those."""
    lines = (folder / "near.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    held = [text for text in texts if is_heldout([{"role": "user", "content": text}], 0.125)]
    return len(texts) - len(held) - len(gone)


def has_any(texts: Iterable[str], gone: set[str]) -> bool:
    return any(f"<｜User｜>{text}<｜Assistant｜>" in whole for whole in texts for text in gone)


def test_sft_learns_none_and_says_so(
    start: Path, tokenizer: Any, near: tuple[DomainSpec, set[str]], new_job: NewJob
) -> None:
    spec, gone = near
    config = SftConfig(num_steps=1, rows_per_step=8, optimizer=OPTIMIZER)
    plain = spec.model_copy(update={"decontaminate": None})
    every = sft.demonstrations(plain, tokenizer, config, new_job("plain"))
    clean = sft.demonstrations(spec, tokenizer, config, new_job("clean"))
    assert has_any((tokenizer.decode(row.tokens) for row in every), gone)
    assert not has_any((tokenizer.decode(row.tokens) for row in clean), gone)
    assert len(every) - len(clean) == len(gone)
    assert not (new_job("plain").out / overlap.FOLDER).exists()
    job = new_job("sft", {"start": start})
    sft.work(SftStage(domains=[spec], sft=config), job)
    assert job.metrics.records()[0]["contaminated/near"] == len(gone)
    check_told(job.out, gone)


def test_grpo_visits_none_and_says_so(
    start: Path, near: tuple[DomainSpec, set[str]], new_job: NewJob, recipe_folder: Path
) -> None:
    spec, gone = near
    job = new_job("grpo", {"start": start})
    config = GrpoConfig(num_steps=1, prompts_per_step=2, samples_per_prompt=2, optimizer=OPTIMIZER)
    grpo.work(GrpoStage(domains=[spec], grpo=config), job)
    first = job.metrics.records()[0]
    assert first["contaminated/near"] == len(gone)
    assert first["prompts/near"] == num_clean(recipe_folder, gone)
    check_told(job.out, gone)


def test_best_of_answers_none_and_says_so(
    start: Path,
    tokenizer: Any,
    near: tuple[DomainSpec, set[str]],
    new_job: NewJob,
    recipe_folder: Path,
) -> None:
    spec, gone = near
    job = new_job("best", {"start": start, "sampler": start})
    how = BestOfConfig(
        num_steps=1, rows_per_step=4, samples_per_prompt=2, min_reward=-1, optimizer=OPTIMIZER
    )
    spec = spec.model_copy(update={"max_new_tokens": 64})
    accepted = best_of.accept(BestOfStage(domain=spec, best_of=how), job)
    assert accepted["counts"]["prompts"] == num_clean(recipe_folder, gone)
    assert not has_any((tokenizer.decode(a["prompt"]) for a in accepted["answers"]), gone)
    check_told(job.out, gone)
