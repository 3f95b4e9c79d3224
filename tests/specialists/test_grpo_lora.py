"""GRPO of an adapter: its gradient, its sampler, its reference, and what comes out."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import GradientCopy, check_killed
from torch import Tensor
from transformers import TrainerCallback

from posttrain.adapters import find_base, is_adapter
from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.types import Request, Rollout
from specialists import grpo, sft, training
from specialists.config import GrpoConfig, GrpoStage, LoraConfig, SftConfig, SftStage
from specialists.groups import as_trl
from specialists.lora import engine_for, load_with_adapter

NewJob = Callable[..., Job]
LORA = {"rank": 2, "alpha": 4}
ALL = {**LORA, "experts": True}


def stage(domain: DomainSpec, **settings: Any) -> GrpoStage:
    defaults = {
        "num_steps": 3, "prompts_per_step": 2, "samples_per_prompt": 3, "num_slots": 6,
        "optimizer": OptimizerConfig(learning_rate=2e-2), "lora": LORA,
    }  # fmt: skip
    return GrpoStage(domains=[domain], grpo=GrpoConfig.model_validate({**defaults, **settings}))


@pytest.fixture
def tuned(start: Path, words: DomainSpec, new_job: NewJob) -> Path:
    """An adapter's stage: what SFT makes."""
    job = new_job("sft", {"start": start})
    settings = {"lora": LORA, "num_steps": 2, "rows_per_step": 4}
    sft.work(SftStage(domains=[words], sft=SftConfig.model_validate(settings)), job)
    return job.out


def scrambled(model: Any, *, std: float = 0.1) -> Any:
    """The same with an adapter that is not zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@pytest.mark.parametrize("lora", [LORA, ALL])
def test_the_engine_samples_with_the_adapter_and_leaves_no_trace(
    start: Path, lora: dict[str, Any]
) -> None:
    model = scrambled(load_with_adapter(start / "checkpoint", LoraConfig.model_validate(lora))[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_for(model, num_slots=2, seed=0)
    requests = [Request(str(n), [0, 5, *range(30, 30 + n)], max_new_tokens=7) for n in range(5)]
    for rollout in list(engine.run(requests)):
        ids = [*rollout.prompt, *rollout.response]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            with model.disable_adapter():
                plain = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = torch.arange(len(rollout.prompt) - 1, len(ids) - 1)
        own, base = (x[places, torch.tensor(rollout.response)] for x in (logp, plain))
        torch.testing.assert_close(torch.tensor(rollout.logp), own, atol=5e-6, rtol=0)
        assert (own - base).abs().max() > 1e-3
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_is_trained_further_by_the_same_lora_alone(start: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    load_with_adapter(start / "checkpoint", LoraConfig(rank=2))[0].save_pretrained(path)
    model, base = load_with_adapter(path, LoraConfig(rank=2))
    assert (model.peft_config["default"].r, base) == (2, start / "checkpoint")
    for other in ({"alpha": 5}, {"targets": r".*self_attn\.q_a_proj"}, {"experts": True}):
        lora = LoraConfig.model_validate({"rank": 2, **other})
        with pytest.raises(CheckpointError, match="give both stages the same lora"):
            load_with_adapter(path, lora)


def test_a_run_that_is_given_up_leaves_the_base_as_it_was(start: Path) -> None:
    model = scrambled(load_with_adapter(start / "checkpoint", LoraConfig(rank=2))[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rollouts = engine_for(model, num_slots=1, seed=0).run(
        [Request(str(n), [0, 5], max_new_tokens=4) for n in range(3)]
    )
    next(rollouts)
    rollouts.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in before.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_weight": 0.1},
        {"lora": ALL, "keep_routing": True, "top_p": 0.9},
        {"steps_per_sampling": 3, "top_k": 9, "rows_per_microbatch": 2, "checkpoint_every": 3},
    ],
)
def test_sampler_and_learner_agree_and_only_the_adapter_moves(
    start: Path, words: DomainSpec, new_job: NewJob, settings: dict[str, Any]
) -> None:
    job = new_job("grpo", {"start": start})
    grpo.work(stage(words, **settings), job)
    records = [record for record in job.metrics.records() if record["step"] > 0]
    on_policy = records[:1] if "steps_per_sampling" in settings else records
    assert all(record["sampler_gap_max"] < 1e-5 for record in on_policy)
    if "kl_weight" in settings:  # the reference is the base, from which the policy moves away
        assert records[0]["kl"] == pytest.approx(0.0, abs=1e-9)
        assert records[2]["kl"] > 1e-5
    place = job.out / "checkpoint"
    assert is_adapter(place)
    assert find_base(place) == (start / "checkpoint").resolve()
    assert not (place / "ref").exists()
    base, result = load_model(start / "checkpoint").state_dict(), load_model(place).state_dict()
    moved = {name for name, tensor in result.items() if not torch.equal(tensor, base[name])}
    assert moved
    adapted = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "experts")
    assert all(any(part in name for part in adapted) for name in moved)


REWARDS = (1.0, 0.0, 0.5, 0.0)
ADVANTAGES = (0.5, -0.5, 0.25, -0.25)
ROLLOUTS = [
    Rollout("p", "words", 0, prompt, response, is_own, [0.0] * len(response))
    for prompt, response, is_own in (
        ([40, 41, 42], [60, 61, 1], [True, True, True]),
        ([40, 41, 42], [60, 90, 91, 62, 63, 1], [True, False, False, True, True, True]),
        ([50], [64, 65], [True, True]),
        ([50], [66, 1], [True, True]),
    )
]


class Scripted:
    """In a sampler's place."""

    visits = (0, 1)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        return as_trl(ROLLOUTS, REWARDS)


def logps(model: Any, rollout: Rollout) -> Tensor:
    """log p of the response at temperature 0.7, the row alone and without padding."""
    ids = [*rollout.prompt, *rollout.response]
    logits = model(input_ids=torch.tensor([ids])).logits[0] / 0.7
    first = len(rollout.prompt) - 1
    picked = logits[first:-1].log_softmax(-1)
    return picked.gather(1, torch.tensor(rollout.response)[:, None]).squeeze(1)


@pytest.mark.parametrize("rows_per_microbatch", [None, 1])
def test_the_gradient_is_that_of_the_formula_with_the_start_as_reference(
    start: Path, tuned: Path, words: DomainSpec, new_job: NewJob, rows_per_microbatch: int | None
) -> None:
    """d/dw of (sum over own tokens of -r A + beta r (e^d - d - 1)) / (own tokens of the step), with
    d = log q - log p and q the adapter that the stage started from."""
    job = new_job("grpo", {"start": tuned})
    config = stage(
        words, num_steps=1, samples_per_prompt=2, temperature=0.7, kl_weight=0.3,
        rows_per_microbatch=rows_per_microbatch,
        optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e9),
    )  # fmt: skip
    model, base = load_with_adapter(tuned / "checkpoint", LoraConfig.model_validate(LORA))
    twin = scrambled(copy.deepcopy(model))
    scripted: Any = Scripted()
    tokenizer = load_tokenizer(start / "checkpoint")
    trainer: Any = grpo.build_trainer(model, tokenizer, scripted, config, job)
    scrambled(model)  # the policy is elsewhere than its reference by now
    trainer.add_callback(found := GradientCopy())
    training.run(trainer, job, tokenizer, base=base)
    reference = load_model(tuned / "checkpoint")
    terms: list[Tensor] = []
    for rollout, advantage in zip(ROLLOUTS, ADVANTAGES, strict=True):
        logp = logps(twin, rollout)
        with torch.no_grad():
            d = logps(reference, rollout) - logp.detach()
            assert d.abs().max() > 1e-3
        ratio, gap = (logp - logp.detach()).exp(), d + logp.detach() - logp
        loss = -ratio * advantage + 0.3 * ratio * (gap.exp() - gap - 1)
        terms.append((loss * torch.tensor(rollout.is_own)).sum())
    (torch.stack(terms).sum() / sum(sum(r.is_own) for r in ROLLOUTS)).backward()
    wanted = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert wanted
    assert all(".default." in name for name in found.gradient)
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_weight": 0.05, "reference_every": 1},
        {"kl_weight": 0.05},
        {"lora": ALL, "keep_routing": True},
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    settings: dict[str, Any],
) -> None:
    config = stage(words, num_steps=5, checkpoint_every=2, rows_per_microbatch=3, **settings)
    check_killed(partial(grpo.work, config), new_job, cut_after, start=start, last=3)


def test_the_adapter_of_sft_is_trained_further(
    start: Path, tuned: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": tuned})
    grpo.work(stage(words, num_steps=1, kl_weight=0.1), job)
    (record,) = [record for record in job.metrics.records() if record["step"] > 0]
    assert record["kl"] == pytest.approx(0.0, abs=1e-9)  # to where it started from
    assert record["sampler_gap_max"] < 1e-5
    assert find_base(job.out / "checkpoint") == (start / "checkpoint").resolve()
    with pytest.raises(CheckpointError, match="is an adapter with r 2"):
        grpo.work(stage(words, lora={"rank": 3}), new_job("other", {"start": tuned}))


def test_the_reference_becomes_the_adapter_of_its_step(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": start})
    config = stage(words, samples_per_prompt=2, kl_weight=0.1, reference_every=2)
    model, base = load_with_adapter(start / "checkpoint", LoraConfig.model_validate(LORA))
    scripted: Any = Scripted()
    scripted.visits = tuple(range(6))
    tokenizer = load_tokenizer(start / "checkpoint")
    trainer: Any = grpo.build_trainer(model, tokenizer, scripted, config, job)
    taken: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            named = model.named_parameters()
            taken.append({n: p.detach().clone() for n, p in named if ".default." in n})

    trainer.callback_handler.callbacks.insert(0, Look())
    training.run(trainer, job, tokenizer, base=base)
    found = {n: p for n, p in model.named_parameters() if ".ref." in n}
    assert len(taken) == 3
    for step, is_same in ((1, True), (2, False)):
        ours = taken[step]
        pairs = [
            (found[name.replace(".default.", ".ref.")], tensor) for name, tensor in ours.items()
        ]
        assert all(torch.equal(a, b) for a, b in pairs) == is_same
