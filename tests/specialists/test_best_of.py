"""SFT on own answers: which are learned, token by token, and that a kill changes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from stage_runs import trained

from posttrain.adapters import is_adapter
from posttrain.checkpoints import load_model, weights_hash
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task
from posttrain.tokenizer import USER
from specialists import best_of, sft, training
from specialists.best_of import Graded, best
from specialists.config import BestOfConfig, BestOfStage

NewJob = Callable[..., Job]


def stage(domain: DomainSpec, **settings: Any) -> BestOfStage:
    defaults = {
        "num_steps": 3,
        "rows_per_step": 4,
        "num_prompts": 12,
        "samples_per_prompt": 4,
        "min_reward": 0.3,
        "num_slots": 8,
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    best = BestOfConfig.model_validate({**defaults, **settings})
    return BestOfStage(domain=domain, best_of=best)


@pytest.fixture(scope="module")
def speaker(start: Path, recipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage whose model has learned to end its answers."""
    out = tmp_path_factory.mktemp("speaker")
    domain = {"name": "words", "data": {"jsonl": "words.jsonl"}, "reward": "exact"}
    how = {"num_steps": 25, "rows_per_step": 16, "optimizer": {"learning_rate": 5e-3}}
    config = sft.SftStage.model_validate({"domains": [domain], "sft": how})
    metrics = Metrics(out / "metrics.jsonl", stage="speaker")
    job = Job(out, {"start": start}, recipe_folder, seed=3, num_threads=1, metrics=metrics)
    sft.work(config, job)
    return out


def answers_in(job: Job) -> list[dict[str, Any]]:
    return json.loads((job.out / best_of.ACCEPTED).read_text())["answers"]


def graded(reward: float, length: int, sample: int, *, is_cut: bool = False) -> Graded:
    response = [60 + sample] * length
    rollout = Rollout("p", "words", 0, [40], response, [True] * length, [0.0] * length, sample)
    return Graded(replace(rollout, finish_reason="length" if is_cut else "stop"), reward)


def test_the_best_are_kept_shorter_ones_first_whatever_order_they_came_in() -> None:
    group = [
        graded(0.5, 1, 0),  # too bad
        graded(1.0, 3, 1),
        graded(1.0, 2, 3),
        graded(1.0, 2, 2),  # sampled before its equal
        graded(2.0, 9, 4),
        graded(3.0, 1, 5, is_cut=True),
    ]
    twin = group[1]
    group.append(Graded(replace(twin.rollout, sample=6), twin.reward))  # the same answer again
    for seed in range(5):
        Random(seed).shuffle(group)
        for keep, wanted in ((1, [4]), (3, [4, 2, 3]), (7, [4, 2, 3, 1])):
            config = BestOfConfig(keep_per_prompt=keep, samples_per_prompt=7, min_reward=1.0)
            assert [one.rollout.sample for one in best(group, config)] == wanted


def test_what_is_learned_is_what_the_sampler_drew_graded_again(
    speaker: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    """Against another engine and the reward by hand, prompt by prompt."""
    job = new_job("best_of", {"start": speaker, "sampler": speaker})
    config = stage(words, num_steps=1)
    best_of.work(config, job)
    task = Task(words, tokenizer, folder=job.folder, seed=job.seed)
    rows = sorted(task.train, key=lambda row: row.id)[:12]
    engine = Engine(load_model(speaker / "checkpoint"), num_slots=3, seed=job.seed)
    wanted: dict[str, tuple[float, int, int, list[int]]] = {}
    for rollout in engine.run(task.requests(rows, num_samples=4)):
        if rollout.finish_reason == "length":
            continue
        text = tokenizer.decode(rollout.response[:-1])
        reward = sum(letter < "n" for letter in text) / max(len(text), 1)
        key = (-reward, len(rollout.response), rollout.sample, rollout.response)
        if reward >= 0.3:
            wanted[rollout.prompt_id] = min(wanted.get(rollout.prompt_id, key), key)
    found = {answer["prompt_id"]: answer["response"] for answer in answers_in(job)}
    assert found == {prompt_id: key[3] for prompt_id, key in wanted.items()}
    assert 0 < len(wanted) < 12
    (counts, *_) = job.metrics.records()
    assert counts["prompts_unsolved"] == 12 - len(wanted)
    assert counts["answers"] == 48


def test_only_own_tokens_are_learned() -> None:
    answer = {"prompt_id": "p", "prompt": [0, 5], "response": [7, 8, 9, 1], "is_own": [1, 0, 0, 1]}
    (row,) = best_of.token_rows([answer], learns_all=False)
    assert row.tokens == [0, 5, 7, 8, 9, 1]
    assert row.is_learned == [False, False, True, False, False, True]
    assert sft.labels(row) == [-100, -100, 7, -100, -100, 1]
    (row,) = best_of.token_rows([answer], learns_all=True)
    assert all(row.is_learned)


def test_no_heldout_prompt_is_answered(
    speaker: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("best_of", {"start": speaker, "sampler": speaker})
    best_of.work(stage(words, num_steps=1, num_prompts=None, samples_per_prompt=1), job)
    (counts, *_) = job.metrics.records()
    lines = (job.folder / "words.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    held = {
        prompt
        for prompt in prompts
        if sha256(f"user {prompt}".encode()).digest()[0] < 256 * words.heldout_share
    }
    assert held
    assert counts["prompts"] == len(prompts - held)
    asked = {tokenizer.decode(a["prompt"]).split(USER)[1].split("<")[0] for a in answers_in(job)}
    assert asked <= prompts - held


def test_answers_nobody_would_learn_are_refused_in_words(
    speaker: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("best_of", {"start": speaker, "sampler": speaker})
    message = r"none of 48 answers to 12 prompts earned best_of.min_reward 2 uncut \(the most was"
    with pytest.raises(DataError, match=message):
        best_of.work(stage(words, min_reward=2.0), job)


class CutSampling(Metrics):
    """Metrics of a run that is interrupted while it samples."""

    def log(self, step: int, total: int, **values: float | int | str) -> None:
        if int(values.get("prompts_answered", 0)) >= 5:
            raise KeyboardInterrupt
        super().log(step, total, **values)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_killed_while_it_samples_and_while_it_learns_goes_on_to_the_same_bits(
    speaker: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    lora: dict[str, int] | None,
) -> None:
    config = stage(words, lora=lora, checkpoint_every=1)
    inputs = {"start": speaker, "sampler": speaker}
    if lora:  # a fresh one's random numbers are the same after sampling and without it
        first = new_job("sft", {"start": speaker})
        tuned = sft.SftConfig.model_validate({"lora": lora, "num_steps": 1, "rows_per_step": 4})
        sft.work(sft.SftStage(domains=[words], sft=tuned), first)
        inputs["sampler"] = first.out
    straight, killed = new_job("straight", inputs), new_job("killed", inputs)
    best_of.work(config, straight)
    sampling = CutSampling(killed.out / "metrics.jsonl", stage="best_of")
    with pytest.raises(KeyboardInterrupt):
        best_of.work(config, new_job("killed", inputs, metrics=sampling))
    journal = killed.out / best_of.JOURNAL
    before = journal.read_bytes()
    assert before.count(b'"tokens"') > 5
    assert not (killed.out / best_of.ACCEPTED).exists()
    for last in (-1, 1):  # as training begins, and after its first step
        with pytest.raises(KeyboardInterrupt):
            best_of.work(config, new_job("killed", inputs, metrics=cut_after(killed.out, last)))
    best_of.work(config, killed)
    assert trained(killed) == trained(straight)
    for folder, job in (("straight", straight), ("killed", killed)):
        assert not (job.out / best_of.JOURNAL).exists(), folder
    assert answers_in(killed) == answers_in(straight)
    places = [job.out / training.RESULT for job in (straight, killed)]
    assert weights_hash(places[0]) == weights_hash(places[1])
    assert is_adapter(places[0]) == bool(lora)


def test_the_base_learns_what_another_model_answered(
    start: Path, speaker: Path, words: DomainSpec, new_job: NewJob
) -> None:
    jobs = {
        name: new_job(name, {"start": begin, "sampler": speaker})
        for name, begin in (("base", start), ("specialist", speaker))
    }
    for job in jobs.values():
        best_of.work(stage(words, num_steps=1), job)
    assert answers_in(jobs["base"]) == answers_in(jobs["specialist"])
    before = load_model(start / "checkpoint").state_dict()
    after = load_model(jobs["base"].out / "checkpoint").state_dict()
    assert max((after[n] - before[n]).abs().max() for n in before) < 0.01  # one step away
    hashes = {name: weights_hash(job.out / "checkpoint") for name, job in jobs.items()}
    assert hashes["base"] != hashes["specialist"]
