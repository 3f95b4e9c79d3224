"""What SFT's result is: the whole model or an adapter, the last weights or the best ones."""

import copy
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stage_runs import GradientCopy, check_killed
from torch import Tensor
from transformers import TrainerState

from posttrain.adapters import find_base, is_adapter
from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.errors import CheckpointError, DataError
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.tasks import Task
from specialists import grpo, sft, training
from specialists.config import GrpoConfig, GrpoStage, LoraConfig, SftConfig, SftStage
from specialists.lora import load_with_adapter
from specialists.rows import TokenRow
from specialists.validation import BestWeights

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def stage(domain: DomainSpec, **settings: Any) -> SftStage:
    defaults = {"num_steps": 6, "rows_per_step": 4, "optimizer": OPTIMIZER}
    return SftStage(domains=[domain], sft=SftConfig.model_validate({**defaults, **settings}))


def mean_loss(model: Any, rows: list[TokenRow]) -> Tensor:
    """Cross entropy over all learned tokens, row by row and without padding."""
    losses: list[Tensor] = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0, :-1]
        learned = torch.tensor(row.is_learned[1:])
        target = torch.tensor(row.tokens[1:])[learned]
        losses.append(F.cross_entropy(logits[learned], target, reduction="none"))
    return torch.cat(losses).mean()


LORA = LoraConfig(rank=2, alpha=4)


def test_an_adapter_is_the_result_where_the_recipe_asks_for_one(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft", {"start": start})
    sft.work(stage(words, lora=LORA.model_copy(update={"experts": True}), num_steps=4), job)
    place = job.out / "checkpoint"
    assert is_adapter(place)
    assert find_base(place) == (start / "checkpoint").resolve()
    base, trained = load_model(start / "checkpoint").state_dict(), load_model(place).state_dict()
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, base[name])}
    assert any("experts" in name for name in moved)
    assert any("kv_proj" in name for name in moved)
    assert not any("embed" in name or "lm_head" in name or "norm" in name for name in moved)
    again = new_job("again", {"start": job.out})  # goes on with the same adapter
    sft.work(stage(words, lora=LORA.model_copy(update={"experts": True}), num_steps=1), again)
    assert find_base(again.out / "checkpoint") == (start / "checkpoint").resolve()
    with pytest.raises(CheckpointError, match="is an adapter with r 2, and lora asks for 3"):
        sft.work(stage(words, lora=LoraConfig(rank=3)), new_job("other", {"start": job.out}))


def test_the_adapter_learns_what_the_formula_says(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    """One step of plain gradient descent on the factors, against PEFT's own forward."""
    job = new_job("sft", {"start": start})
    settings: dict[str, Any] = {"num_steps": 1, "rows_per_step": 6, "lora": LORA}
    settings["optimizer"] = OPTIMIZER.model_copy(update={"max_grad_norm": 1e9})
    config = stage(words, **settings)
    rows = sft.demonstrations(words, tokenizer, config.sft, job)
    model, _ = load_with_adapter(start / "checkpoint", LORA)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    twin = copy.deepcopy(model)
    data = sft.in_order([rows], config.sft, seed=0, weights=None)
    trainer: Any = sft.build_trainer(model, tokenizer, data, config.sft, job)
    trainer.add_callback(found := GradientCopy())
    training.run(trainer, job, tokenizer, base=start / "checkpoint")
    order = {tuple(row.tokens): row for row in rows}
    mean_loss(twin, [order[tuple(ids)] for ids in data["input_ids"]]).backward()
    wanted = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in wanted)
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-3, atol=1e-6)


def test_a_prompt_is_on_one_side_whatever_other_rows_there_are(
    tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    rows = sft.demonstrations(words, tokenizer, stage(words).sft, new_job("sft"))
    learned, kept = sft.split_validation({"words": rows}, 0.3)
    assert 0.1 < len(kept) / len(rows) < 0.5
    assert not {row.id for row in kept} & {row.id for row in learned["words"]}
    fewer, some = sft.split_validation({"words": rows[::2]}, 0.3)
    assert {row.id for row in some} <= {row.id for row in kept}
    assert {row.id for row in fewer["words"]} <= {row.id for row in learned["words"]}
    assert sft.split_validation({"words": rows}, 0.0) == ({"words": rows}, [])
    with pytest.raises(DataError, match=r"validation_share 1e-09 keeps 0 of"):
        sft.split_validation({"words": rows}, 1e-9)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_result_is_the_weights_at_the_lowest_validation_loss_killed_or_not(
    start: Path,
    tokenizer: Any,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    lora: LoraConfig | None,
) -> None:
    config = stage(
        words, num_steps=9, rows_per_step=4, num_demonstrations=8, validation_share=0.3,
        validate_every=2, checkpoint_every=3, lora=lora,
        optimizer=OptimizerConfig(learning_rate=3e-2),
    )  # fmt: skip
    job, _ = check_killed(partial(sft.work, config), new_job, cut_after, start=start, last=7)
    records = job.metrics.records()
    losses = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    assert list(losses) == [2, 4, 6, 8, 9]
    best = min(losses, key=losses.__getitem__)
    assert best < 9, "this learning rate should overfit eight rows"
    model: Any = load_model(job.out / "checkpoint")
    rows = sft.demonstrations(words, tokenizer, config.sft, job)
    _, kept = sft.split_validation({"words": rows}, 0.3)
    assert mean_loss(model, kept).item() == pytest.approx(losses[best], rel=1e-4)
    assert not (job.out / "best").exists()


def score_by_hand(folder: Path, words: DomainSpec, kept: list[TokenRow], job: Job) -> float:
    """The mean reward of two samples to each kept prompt, an engine and the reward by hand."""
    tokenizer = load_tokenizer(folder)
    with closing(Task(words, tokenizer, folder=job.folder, seed=job.seed)) as task:
        chosen = sorted({one.id for one in kept})[:8]
        rows = [row for row in task.train if row.id in chosen]
        assert len(rows) == 8
        assert not {row.id for row in rows} & {row.id for row in task.heldout}
        requests = task.requests(rows, num_samples=2, temperature=1.0)
    rewards: list[float] = []
    for rollout in Engine(load_model(folder), num_slots=5, seed=job.seed).run(requests):
        end = rollout.response[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(rollout.response[:-1] if end else rollout.response)
        rewards.append(sum(letter < "n" for letter in text) / max(len(text), 1))
    return fmean(rewards)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_result_is_the_weights_at_the_highest_score_killed_or_not(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    lora: LoraConfig | None,
) -> None:
    config = stage(
        words, num_steps=7, validation_share=0.3, validate_every=2, checkpoint_every=3, lora=lora,
        score={"samples_per_prompt": 2, "temperature": 1.0, "num_slots": 16, "num_prompts": 8},
        best_by="score",
        optimizer=OptimizerConfig(learning_rate=3e-2),
    )  # fmt: skip
    job, _ = check_killed(partial(sft.work, config), new_job, cut_after, start=start, last=5)
    tried = [record for record in job.metrics.records() if "validation_score" in record]
    assert [record["step"] for record in tried] == [2, 4, 6, 7]
    best = max(tried, key=lambda record: (record["validation_score"], -record["validation_loss"]))
    by_loss = min(tried, key=lambda record: record["validation_loss"])
    assert lora or by_loss["step"] != best["step"], "the choice by loss would be the same"
    rows = sft.demonstrations(words, load_tokenizer(start / "checkpoint"), config.sft, job)
    _, kept = sft.split_validation({"words": rows}, 0.3)
    found = score_by_hand(job.out / "checkpoint", words, kept, job)
    assert found == pytest.approx(best["validation_score"], abs=1e-9)


def test_equal_scores_are_told_apart_by_the_loss(start: Path, new_job: NewJob) -> None:
    model: Any = load_model(start / "checkpoint")
    scores = iter([0.5, 0.75, 0.75, 0.75, 0.25])
    best = BestWeights(
        model, new_job("sft"), score=lambda _: {"validation_score": next(scores)}, by_score=True
    )
    arguments: Any = None
    control: Any = None
    for step, loss in enumerate((1.0, 3.0, 2.0, 2.0, 0.5), start=1):
        state = TrainerState(global_step=step, max_steps=5)
        best.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
    assert best.restore() == 3


def test_a_score_is_the_mean_over_domains_and_of_so_many_prompts(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job, model = new_job("sft"), load_model(start / "checkpoint")
    other = words.model_copy(update={"name": "other", "heldout_share": 0.5})
    specs = [words, other]
    rows = {s.name: sft.demonstrations(s, tokenizer, SftConfig(), job) for s in specs}
    config = SftConfig.model_validate({"validation_share": 0.5, "score": {"num_prompts": 5}})
    with sft.task_score(specs, rows["words"] + rows["other"], tokenizer, config, job) as score:
        assert score is not None
        found = score(model)
    names = ["validation_score/words", "validation_score/other"]
    assert found["validation_score"] == pytest.approx(fmean(found[name] for name in names))
    for spec in specs:
        chosen = sorted(rows[spec.name], key=lambda row: row.id)[:5]
        with sft.task_score([spec], chosen, tokenizer, config, job) as score:
            assert score is not None
            alone = score(model)
        assert alone == {"validation_score": found[f"validation_score/{spec.name}"]}


def test_the_best_weights_are_kept_with_the_buffers_of_their_step(
    start: Path, new_job: NewJob
) -> None:
    model: Any = load_model(start / "checkpoint")
    model.model.embed_tokens.requires_grad_(False)
    best = BestWeights(model, new_job("sft"))
    arguments: Any = None
    control: Any = None
    wanted: dict[str, Tensor] = {}
    for step, loss in enumerate((3.0, 1.0, 2.0), start=1):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1.0)
        state = TrainerState(global_step=step, max_steps=3)
        best.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        if step == 2:
            wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert best.restore() == 2
    frozen = model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        lag = 1.0 if tensor.data_ptr() == frozen.data_ptr() else 0.0  # it is not trained
        torch.testing.assert_close(tensor, wanted[name] + lag if lag else wanted[name])
    assert any("e_score_correction_bias" in name for name in wanted)


def test_grpo_goes_on_from_an_adapter_with_the_whole_model(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    first = new_job("sft", {"start": start})
    sft.work(stage(words, lora=LORA, num_steps=2), first)
    job = new_job("grpo", {"start": first.out})
    settings = {"num_steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2}
    grpo.work(GrpoStage(domains=[words], grpo=GrpoConfig.model_validate(settings)), job)
    assert not is_adapter(job.out / "checkpoint")
    before, after = (load_model(f.out / "checkpoint").state_dict() for f in (first, job))
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any("lm_head" in name for name in moved)
    assert max((before[n] - after[n]).abs().max() for n in moved) < 0.01
