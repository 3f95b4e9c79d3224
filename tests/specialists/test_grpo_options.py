"""GRPO off-policy and on what the sampler chose: gradients against formulas, a row at a time."""

import json
import math
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grpo_cases import (
    ADVANTAGES,
    ANSWERS,
    OFFSETS,
    Case,
    Scripted,
    clipped,
    logps,
    off_policy,
    rollouts_of,
    stage,
)
from pydantic import ValidationError
from stage_runs import check_killed
from torch import Tensor
from transformers import TrainerCallback

from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task
from specialists import grpo, training
from specialists.config import CurriculumConfig, GrpoConfig, LengthPenalty
from specialists.curriculum import Curriculum
from specialists.effort import length_penalty
from specialists.groups import GroupSampler

NewJob = Callable[..., Job]


@pytest.fixture
def case(start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob) -> Case:
    return Case(start, tokenizer, words, new_job("grpo"))


def test_later_steps_of_a_sampling_clip_the_ratio_to_the_sampler(case: Case) -> None:
    rollouts = off_policy(case)
    found = case.gradient(rollouts, steps_per_sampling=2)
    case.check(found, rollouts, lambda m, r, a: clipped(logps(m, r), r, a), num_steps=2)
    assert {record["clipped"] > 0 for record in case.records()} >= {True}


def test_tokens_beyond_the_largest_ratio_carry_no_gradient(case: Case) -> None:
    rollouts = off_policy(case)
    found = case.gradient(rollouts, steps_per_sampling=2, max_ratio=1.5, clip_high=9.0)

    def loss_of(model: Any, rollout: Rollout, advantage: float) -> Tensor:
        logp, sampled = logps(model, rollout), torch.tensor(rollout.logp)
        near = (logp - sampled).abs() < math.log(1.5)
        ratio = (torch.where(near, logp, logp.detach()) - sampled).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - 0.2, 1 + 9) * advantage)

    case.check(found, rollouts, loss_of, num_steps=2)
    num_far = sum(
        abs(OFFSETS[(t + 3 * n) % 6]) > math.log(1.5) and own
        for n, r in enumerate(rollouts)
        for t, own in enumerate(r.is_own)
    )
    assert num_far == sum(
        round(record["tokens_masked"] * tokens)
        for record, tokens in zip(case.records(), tokens_of(case), strict=True)
    )


def tokens_of(case: Case) -> list[int]:
    """Own tokens of each step: TRL deals a sampling's rows out over its steps at random."""
    shares = [record["tokens_masked"] for record in case.records()]
    sizes = [sum(own) for _, _, own in ANSWERS]
    fits = [
        [sizes[i] + sizes[j], sum(sizes) - sizes[i] - sizes[j]]
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    return next(
        fit
        for fit in fits
        if all(abs(s * n - round(s * n)) < 1e-4 for s, n in zip(shares, fit, strict=True))
    )


def test_worse_than_average_answers_that_are_too_far_off_are_left_out(case: Case) -> None:
    rollouts, limit = off_policy(case), 0.05
    found = case.gradient(rollouts, steps_per_sampling=2, off_policy_mask=limit)
    left_out: list[bool] = []

    def loss_of(model: Any, rollout: Rollout, advantage: float) -> Tensor:
        logp = logps(model, rollout)
        is_own = torch.tensor(rollout.is_own)
        gap = (torch.tensor(rollout.logp) - logp.detach())[is_own].mean().item()
        left_out.append(advantage < 0 and gap > limit)
        return clipped(logp, rollout, advantage) * (0.0 if left_out[-1] else 1.0)

    case.check(found, rollouts, loss_of, num_steps=2)
    assert sorted(left_out) == [False, False, False, True]
    assert sum(record["rows_masked"] for record in case.records()) == pytest.approx(0.5)


@pytest.mark.parametrize("rows_per_microbatch", [None, 1])
def test_the_loss_is_over_the_tokens_that_could_be_sampled(
    case: Case, rows_per_microbatch: int | None
) -> None:
    support = [
        [sorted({token, 5, 70 + t}) if own and t != 1 else [] for t, (token, own) in tokens]
        for tokens in (
            list(enumerate(zip(response, is_own, strict=True))) for _, response, is_own in ANSWERS
        )
    ]
    rollouts = rollouts_of(support=support)
    found = case.gradient(
        rollouts, num_steps=1, prompts_per_step=2, rows_per_microbatch=rows_per_microbatch
    )
    allowed = dict(zip(map(id, rollouts), support, strict=True))
    case.check(
        found,
        rollouts,
        lambda m, r, a: -a * logps(m, r, allowed=allowed[id(r)]),
        num_steps=1,
    )


@pytest.mark.parametrize("rows_per_microbatch", [None, 1])
def test_tokens_are_learned_with_the_experts_that_sampled_them(
    case: Case, rows_per_microbatch: int | None
) -> None:
    config = case.model().config
    rng = np.random.default_rng(0)
    routes: list[Any] = []
    for prompt, response, _ in ANSWERS:
        shape = (len(prompt) + len(response), config.num_hidden_layers)
        order = rng.random((*shape, config.n_routed_experts)).argsort(-1)
        routes.append(order[..., : config.num_experts_per_tok].astype(np.int16))
        routes[-1][-1] = -1
    rollouts = rollouts_of(routes=routes)
    found = case.gradient(
        rollouts, num_steps=1, prompts_per_step=2, rows_per_microbatch=rows_per_microbatch
    )
    own = dict(zip(map(id, rollouts), routes, strict=True))
    case.check(found, rollouts, lambda m, r, a: -a * logps(m, r, routes=own[id(r)]), num_steps=1)


def test_answers_that_were_cut_carry_no_loss_where_the_recipe_says_so(case: Case) -> None:
    rollouts = rollouts_of()
    found = case.gradient(rollouts, num_steps=1, prompts_per_step=2, mask_truncated=True)
    model = case.model()
    terms = [
        (-a * logps(model, r) * torch.tensor(r.is_own)).sum()
        for r, a in zip(rollouts, ADVANTAGES, strict=True)
        if r.response[-1] == 1
    ]
    num_own = sum(sum(r.is_own) for r in rollouts if r.response[-1] == 1)
    (torch.stack(terms).sum() / num_own).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.8, "keep_routing": True},
        {"top_k": 5},
        {"keep_routing": True},
        {"top_k": 9, "kl_weight": 0.1},
    ],
)
def test_the_sampler_and_the_learner_give_one_probability_of_what_was_left(
    start: Path, words: DomainSpec, new_job: NewJob, settings: dict[str, Any]
) -> None:
    job = new_job("grpo", {"start": start})
    grpo.work(stage([words], prompts_per_step=3, samples_per_prompt=3, **settings), job)
    records = [record for record in job.metrics.records() if record["step"] > 0]
    assert all(record["sampler_gap_max"] < 1e-5 for record in records)
    if "kl_weight" in settings:  # the reference is the policy still, over the same tokens
        assert records[0]["kl"] == pytest.approx(0.0, abs=1e-9)


@contextmanager
def sampler_of(
    config: GrpoConfig,
    start: Path,
    tokenizer: Any,
    words: DomainSpec,
    job: Job,
    *,
    curriculum: Curriculum | None = None,
) -> Generator[GroupSampler]:
    """The stage's sampler of one domain."""
    with closing(Task(words, tokenizer, folder=job.folder, seed=0)) as task:
        visits = grpo.prompt_order([task], config, seed=0)
        engine = Engine(load_model(start / "checkpoint"), num_slots=12, seed=0)
        yield GroupSampler(engine, [task], visits, config=config, seed=0, curriculum=curriculum)


def first_step(sampler: GroupSampler) -> dict[str, list[Any]]:
    """What TRL is told in its first step."""
    trainer: Any = type("At", (), {"state": type("State", (), {"global_step": 0})})
    visits = range(sampler.config.prompts_per_step)
    return sampler([str(visit) for visit in visits for _ in range(sampler.size)], trainer)


def test_groups_without_spread_make_room_for_other_prompts(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    words = words.model_copy(update={"max_new_tokens": 1})  # whose rewards are 0 or 1

    def sampled(rounds: int) -> tuple[dict[str, list[Any]], dict[str, float]]:
        config = stage([words], prompts_per_step=6, refill_rounds=rounds, temperature=1.0).grpo
        with sampler_of(config, start, tokenizer, words, new_job("grpo")) as sampler:
            return first_step(sampler), sampler.read_metrics()

    plain, before = sampled(0)
    first, after = sampled(4)
    assert sampled(4)[0] == first  # whatever came before
    assert before["groups_without_spread"] == after["groups_without_spread"] > 0
    assert after["groups_refilled"] >= 1
    assert after["reward_std"] > before["reward_std"]
    assert after["tokens"] > sum(map(sum, first["env_mask"]))
    num_kept = 0
    for i in range(0, 12, 2):
        if len(set(plain["score"][i : i + 2])) > 1:
            assert first["completion_ids"][i : i + 2] == plain["completion_ids"][i : i + 2]
            num_kept += 1
        else:
            assert first["prompt_ids"][i] != plain["prompt_ids"][i]
        assert first["prompt_ids"][i] == first["prompt_ids"][i + 1]
    assert 0 < num_kept < 6


def test_a_prompt_of_the_step_takes_no_groups_place_while_others_are_left(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    words = words.model_copy(update={"max_new_tokens": 1})
    config = stage([words], prompts_per_step=3, refill_rounds=3).grpo
    with sampler_of(config, start, tokenizer, words, new_job("grpo")) as sampler:
        sampler.tasks[0].train = rows = sampler.tasks[0].train[:10]
        sampler.visits = [(0, row) for row in rows]
        asked: list[str] = []
        for attempt in range(4):  # 3 of the plan, 6 others, and then the tenth and repeats
            requests = sampler.sample([0, 1, 2], attempt)
            asked += [group[0].prompt_id for group in requests]
        assert len(set(asked[:10])) == 10
        for visit in range(3):
            assert len(set(asked[visit::3])) == 4  # nor its own again


def test_no_prompt_that_is_known_to_be_useless_takes_a_groups_place(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    words = words.model_copy(update={"max_new_tokens": 1})
    config = stage([words], prompts_per_step=6, refill_rounds=4, temperature=1.0).grpo
    path = new_job("grpo").out / "visits.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    curriculum = Curriculum(path, CurriculumConfig(fresh_share=1.0), seed=0)
    with sampler_of(
        config, start, tokenizer, words, new_job("grpo"), curriculum=curriculum
    ) as sampler:
        rows = sampler.tasks[0].train
        planned = {row.id for _, row in sampler.visits[:6]}
        others = [row for row in rows if row.id not in planned]
        curriculum.begin(0)
        for row in others[3:]:
            curriculum.record(-1, 0, row, has_spread=False)
        first_step(sampler)
        num_refills = sampler.read_metrics()["groups_refilled"]
    measured = [json.loads(line) for line in path.read_text().splitlines()]
    measured = [line for line in measured if line["step"] >= 0]
    assert {line["id"] for line in measured[:6]} == planned
    again = measured[6:]  # what took a place has been measured too
    assert again
    known = {line["id"] for line in measured[:6] if not line["has_spread"]}
    assert {line["id"] for line in again} <= planned - known | {row.id for row in others[:3]}
    assert sum(line["has_spread"] for line in again) == num_refills


def test_the_reference_becomes_the_policy_buffers_too(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": start})
    config = stage(
        [words], num_steps=3, kl_weight=0.1, reference_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    model: Any = load_model(start / "checkpoint")
    scripted: Any = Scripted(rollouts_of()[:2])
    scripted.visits = (0, 1, 2)
    trainer: Any = grpo.build_trainer(model, tokenizer, scripted, config, job)
    taken: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            for module in model.modules():  # as balancing does
                if hasattr(module, "e_score_correction_bias"):
                    module.e_score_correction_bias += 0.01
            taken.append({n: w.clone() for n, w in model.state_dict().items()})

    trainer.callback_handler.callbacks.insert(0, Look())
    scripted_call = Scripted.__call__
    trainer.rollout_func = lambda prompts, trainer: {
        name: values[:2] for name, values in scripted_call(scripted, prompts, trainer).items()
    }
    training.run(trainer, job, tokenizer)
    reference = trainer.ref_model.state_dict()
    assert all(torch.equal(reference[name], tensor) for name, tensor in taken[1].items())
    assert not all(torch.equal(reference[name], tensor) for name, tensor in taken[2].items())


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_weight": 0.05, "reference_every": 1},
        {"steps_per_sampling": 2, "refill_rounds": 1, "top_k": 9, "keep_routing": True},
        {"curriculum": {"fresh_share": 0.3}, "refill_rounds": 2},
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    settings: dict[str, Any],
) -> None:
    config = stage(
        [words], num_steps=5, checkpoint_every=2, rows_per_microbatch=2, prompts_per_step=2,
        optimizer=OptimizerConfig(learning_rate=1e-3), **settings,
    )  # fmt: skip
    check_killed(partial(grpo.work, config), new_job, cut_after, start=start, last=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps_per_sampling": 3}, "steps_per_sampling is 3, which does not divide 20"),
        ({"reference_every": 5}, "kl_weight 0 uses no reference"),
        ({"max_ratio": 1.0}, "max_ratio"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GrpoConfig.model_validate(settings)


def test_length_costs_as_the_formula_says_and_never_more_than_its_cap() -> None:
    config = LengthPenalty(k=0.3, tau=20.0, cap=0.25)
    efforts: list[tuple[Any, float]] = [("none", 1), (37, 37), ("high", 50), ("max", 100)]
    for effort, b in efforts:
        for num_tokens in (1, 7, 64):
            wanted = min(0.25, 0.3 * math.exp(-(b - 1) / 20.0) * num_tokens / 64)
            found = length_penalty(num_tokens, effort, limit=64, config=config)
            assert found == pytest.approx(wanted, rel=1e-12)
    assert length_penalty(64, "none", limit=64, config=config) == 0.25


def test_what_trains_is_the_reward_less_what_length_costs(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    config = stage([words], prompts_per_step=3, length_penalty=LengthPenalty(k=0.4)).grpo
    with sampler_of(config, start, tokenizer, words, new_job("grpo")) as sampler:
        found, logged = first_step(sampler), sampler.read_metrics()
        scores = sampler.score(range(3), sampler.sample(range(3)))
    earned = [score.reward for group in scores for score in group]
    cost = [0.4 * sum(own) / 8 for own in found["env_mask"]]
    assert found["score"] == pytest.approx([r - c for r, c in zip(earned, cost, strict=True)])
    assert logged["reward"] == pytest.approx(sum(earned) / 6)
    assert logged["length_penalty"] == pytest.approx(sum(cost) / 6)
