from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import GradientCopy, check_killed, gradient_of, trained

from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from posttrain.tasks import Task
from posttrain.tokenizer import EOS
from specialists import grpo, training
from specialists.config import GrpoConfig, GrpoStage
from specialists.groups import GroupSampler, as_trl

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def stage(domains: list[DomainSpec], **settings: Any) -> GrpoStage:
    defaults = {
        "num_steps": 5,
        "prompts_per_step": 2,
        "samples_per_prompt": 3,
        "num_slots": 6,
        "optimizer": OPTIMIZER,
    }
    return GrpoStage(domains=domains, grpo=GrpoConfig.model_validate({**defaults, **settings}))


class Scripted:
    """In a sampler's place: two prompts, two answers to each, one with a tool's words inside."""

    visits = (0, 1)
    rewards = (1.0, 0.0, 0.5, 0.0)
    advantages = (0.5, -0.5, 0.25, -0.25)

    def __init__(self) -> None:
        def answer(prompt: list[int], response: list[int], is_own: list[bool]) -> Rollout:
            return Rollout("p", "words", 0, prompt, response, is_own, [0.0] * len(response))

        self.rollouts = [
            answer([40, 41, 42], [60, 61, 1], [True, True, True]),
            answer([40, 41, 42], [60, 90, 91, 62, 63, 1], [True, False, False, True, True, True]),
            answer([50], [64, 65], [True, True]),
            answer([50], [66, 1], [True, True]),
        ]

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        return as_trl(self.rollouts, self.rewards)

    def expected_gradient(self, model: Any, *, temperature: float) -> dict[str, torch.Tensor]:
        """d/dw of -(sum over own tokens of A log p) / (own tokens of the step)."""
        terms: list[torch.Tensor] = []
        for rollout, advantage in zip(self.rollouts, self.advantages, strict=True):
            ids = [*rollout.prompt, *rollout.response]
            logp = (model(torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
            for t, is_own in enumerate(rollout.is_own, start=len(rollout.prompt)):
                if is_own:
                    terms.append(-advantage * logp[t - 1, ids[t]])
        (torch.stack(terms).sum() / len(terms)).backward()
        return gradient_of(model)


@pytest.mark.parametrize("rows_per_microbatch", [None, 2])
def test_the_gradient_is_that_of_the_formula(
    start: Path,
    tokenizer: Any,
    words: DomainSpec,
    new_job: NewJob,
    rows_per_microbatch: int | None,
) -> None:
    scripted, job = Scripted(), new_job("grpo")
    config = stage(
        [words],
        num_steps=1,
        samples_per_prompt=2,
        temperature=0.7,
        rows_per_microbatch=rows_per_microbatch,
        optimizer=OPTIMIZER.model_copy(update={"max_grad_norm": 1e9}),
    )
    model: Any = load_model(start / "checkpoint")
    trainer: Any = grpo.build_trainer(model, tokenizer, scripted, config, job)  # pyright: ignore[reportArgumentType]
    trainer.add_callback(found := GradientCopy())
    training.run(trainer, job, tokenizer)
    wanted = scripted.expected_gradient(load_model(start / "checkpoint"), temperature=0.7)
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-3, atol=1e-6)
    norm = torch.stack([part.norm() for part in wanted.values()]).norm().item()
    assert trained(job)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_sampler_and_the_learner_give_one_probability(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": start})
    grpo.work(stage([words], num_steps=2, temperature=0.8), job)
    assert all(record["sampler_gap_max"] < 1e-5 for record in trained(job))


class ToldAnswers:
    """In an engine's place: gives these answers, the last one first; a text without EOS is cut."""

    version = 0

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.answers = [tokenizer(text)["input_ids"] for text in texts]
        self.end = tokenizer.eos_token_id

    def run(self, requests: list[Request]) -> Iterator[Rollout]:
        for request, ids in reversed(list(zip(requests, self.answers, strict=True))):
            yield Rollout(
                request.prompt_id,
                request.domain,
                version=self.version,
                prompt=request.prompt,
                response=ids,
                is_own=[True] * len(ids),
                logp=[0.0] * len(ids),
                sample=request.sample,
                finish_reason="stop" if ids[-1] == self.end else "length",
            )


def test_a_step_logs_what_its_rollouts_earned(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # a reward is the share of letters below n: 1, 0 and 1/2 in the first group, 1 in the second
    told = ToldAnswers(tokenizer, [f"ab{EOS}", "xyz", f"ax{EOS}", *[f"b{EOS}"] * 3])
    job, config = new_job("grpo"), stage([words], num_steps=1)
    with closing(Task(words, tokenizer, folder=job.folder, seed=job.seed)) as task:
        visits = grpo.prompt_order([task], config.grpo, seed=job.seed)
        sampler = GroupSampler(told, [task], visits, config=config.grpo, seed=0)  # pyright: ignore[reportArgumentType]
        model = load_model(start / "checkpoint")
        trainer = grpo.build_trainer(model, tokenizer, sampler, config, job)
        training.run(trainer, job, tokenizer, read_metrics=sampler.read_metrics)
    (record,) = trained(job)
    assert record["reward"] == pytest.approx(4.5 / 6)
    assert record["reward_std"] == pytest.approx((1 / 6) ** 0.5 / 2)  # of the first group's, halved
    assert record["groups_without_spread"] == 0.5
    assert record["length"] == pytest.approx((3 + 3 + 3 + 2 + 2 + 2) / 6)
    assert record["tokens"] == 3 + 3 + 3 + 2 + 2 + 2
    assert record["truncated"] == pytest.approx(1 / 6)
    assert record["grader_failures"] == record["tool_failures"] == 0


def test_no_two_samples_of_a_run_share_their_seed(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # 8 prompts visited 30 times: each must be met with fresh sample numbers every time
    job = new_job("grpo")
    task = Task(words, tokenizer, folder=job.folder, seed=job.seed)
    task.train = task.train[:8]
    config = stage([words], num_steps=15).grpo
    visits = grpo.prompt_order([task], config, seed=job.seed)
    engine = Engine(load_model(start / "checkpoint"), num_slots=90, seed=job.seed)
    sampler = GroupSampler(engine, [task], visits, config=config, seed=0)
    groups = sampler.sample(range(30))
    seeds = {(r.prompt_id, r.sample) for group in groups for r in group}
    assert len(seeds) == 90
    assert all(len({r.prompt_id for r in group}) == 1 for group in groups)


def test_every_step_visits_all_domains_alike(
    tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo")
    other = words.model_copy(update={"name": "others", "heldout_share": 0.5})
    tasks = [Task(s, tokenizer, folder=job.folder, seed=job.seed) for s in (words, other)]
    config = stage([words, other], num_steps=5, prompts_per_step=6).grpo
    visits = grpo.prompt_order(tasks, config, seed=0)
    for step in range(5):
        assert sorted(task for task, _ in visits[step * 6 : step * 6 + 6]) == [0, 0, 0, 1, 1, 1]


def test_a_mixed_run_logs_each_domain(start: Path, words: DomainSpec, new_job: NewJob) -> None:
    job = new_job("grpo", {"start": start})
    other = words.model_copy(update={"name": "others"})
    grpo.work(stage([words, other], num_steps=1), job)
    (record,) = trained(job)
    both = (record["reward/words"] + record["reward/others"]) / 2
    assert record["reward"] == pytest.approx(both)


@pytest.mark.parametrize("kl_weight", [0.0, 0.05])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    kl_weight: float,
) -> None:
    config = stage([words], checkpoint_every=2, rows_per_microbatch=3, kl_weight=kl_weight)
    check_killed(partial(grpo.work, config), new_job, cut_after, start=start, last=3)
