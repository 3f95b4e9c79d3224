"""Specialists that a model judges: what it cannot be read on does not train, and a killed run comes
to the same verdicts."""

import json
import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_models import always_says, counted_characters, counting, saved, saying_either
from stage_runs import GradientCopy, check_killed, gradient_of, trained
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.job import Job
from posttrain.judge_config import JudgeConfig
from posttrain.metrics import Metrics
from posttrain.rollout.types import Rollout
from posttrain.rollout.weights import copy_weights, load_weights
from posttrain.tokenizer import EOS
from rewards.score import Score
from specialists import best_of, grpo, sft, training
from specialists.config import (
    BestOfConfig,
    BestOfStage,
    GrpoConfig,
    GrpoStage,
    LoraConfig,
    SftConfig,
    SftStage,
)
from specialists.groups import Group, as_trl
from specialists.judge import open_task
from specialists.lora import AdaptedEngine, load_start
from specialists.validation import BestWeights

NewJob = Callable[..., Job]
RUBRIC = "Many marks."


def judged(words: DomainSpec, *, reward: Any = "judge", **judge: Any) -> DomainSpec:
    """The domain of short words, whose answers a model judges by one rubric for all."""
    given = {"checkpoint": "judge", "high": 9, "max_new_tokens": 10, "temperature": 0.0, **judge}
    changed = {
        "reward": reward,
        "judge": JudgeConfig.model_validate(given).model_dump(),
        "reward_options": {"rubric": RUBRIC},
    }
    return DomainSpec.model_validate({**words.model_dump(), **changed})


def stage(domains: list[DomainSpec], **settings: Any) -> GrpoStage:
    defaults = {
        "num_steps": 3,
        "prompts_per_step": 2,
        "samples_per_prompt": 3,
        "num_slots": 6,
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return GrpoStage(domains=domains, grpo=GrpoConfig.model_validate({**defaults, **settings}))


@pytest.fixture(scope="module")
def judges(recipe_folder: Path) -> Path:
    """The recipe's folder, with judges in it."""
    config = JudgeConfig(checkpoint="judge", high=9)
    saved(counting(counted_characters(config, rubric=RUBRIC)), recipe_folder / "judge")
    saved(saying_either("Score: ", "37?"), recipe_folder / "mumbler")
    return recipe_folder


def test_a_judged_run_that_was_killed_goes_on_to_the_same_bits(
    judges: Path,
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
) -> None:
    spec = judged(words, checkpoint="mumbler", temperature=1.0, votes=2)
    config = stage([spec], checkpoint_every=2, num_steps=4)
    straight, _ = check_killed(partial(grpo.work, config), new_job, cut_after, start=start, last=3)
    records = trained(straight)
    assert any(0 < record["votes_unparsed"] < 1 for record in records)
    assert any(record["reward_std"] > 0 for record in records)


def test_a_step_logs_what_the_judge_found(
    judges: Path, start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo", {"start": start})
    spec = judged(words, reward={"judge": 2.0, "my_letters:share_of_a": 1.0})
    grpo.work(stage([spec]), job)
    records = trained(job)
    for record in records:
        total = 2 * record["term/judge"] + record["term/my_letters:share_of_a"]
        assert record["reward"] == pytest.approx(total)
        assert record["judge_unparsed"] == record["votes_unparsed"] == 0
    assert any(record["term/judge"] > 0 for record in records)


def test_a_run_whose_judge_says_nothing_learns_nothing(
    judges: Path, start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    saved(always_says("no"), judges / "silent")
    job = new_job("grpo", {"start": start})
    config = stage([judged(words, checkpoint="silent")], num_steps=2, curriculum={})
    grpo.work(config, job)
    assert (job.out / "visits.jsonl").read_text() == ""  # nor is a prompt thought to be known
    for record in trained(job):
        assert record["reward"] is None
        assert record["judge_unparsed"] == 6
        assert record["groups_without_spread"] == 1
        assert record["grad_norm"] == 0


class Unjudged:
    """In a sampler's place: four answers to one prompt, one of which nobody could judge."""

    rewards = (1.0, math.nan, 0.5, 0.0)
    advantages = (0.5, 0.0, 0.0, -0.5)  # less the mean of the three: 0.5

    def __init__(self) -> None:
        answers = [[60, 61, 1], [66, 1], [64, 65], [63, 62, 60, 1]]
        self.visits = (0,)
        self.rollouts = [
            Rollout("p", "words", 0, [40, 41, 42], ids, [True] * len(ids), [0.0] * len(ids))
            for ids in answers
        ]

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        return as_trl(self.rollouts, self.rewards)

    def expected_gradient(self, model: Any) -> dict[str, torch.Tensor]:
        """d/dw of -(sum over tokens of A log p) / tokens."""
        total, count = torch.zeros(()), 0
        for rollout, advantage in zip(self.rollouts, self.advantages, strict=True):
            ids = [*rollout.prompt, *rollout.response]
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for t in range(len(rollout.prompt), len(ids)):
                total, count = total - advantage * logp[t - 1, ids[t]], count + 1
        (total / count).backward()
        return gradient_of(model)


def test_an_answer_without_a_verdict_is_in_no_mean_and_has_no_gradient(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    sampler, job = Unjudged(), new_job("grpo")
    optimizer = OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e9)
    config = stage(
        [words], num_steps=1, prompts_per_step=1, samples_per_prompt=4, optimizer=optimizer
    )
    model: Any = load_model(start / "checkpoint")
    trainer: Any = grpo.build_trainer(model, tokenizer, sampler, config, job)  # pyright: ignore[reportArgumentType]
    trainer.add_callback(found := GradientCopy())
    training.run(trainer, job, tokenizer)
    wanted = sampler.expected_gradient(load_model(start / "checkpoint"))
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-3, atol=1e-6)


MARKS = "".join(
    mark
    for mark in counted_characters(JudgeConfig(checkpoint="actor", high=9), rubric=RUBRIC)
    if mark not in "xyz"  # of which prompts are made
)


def test_the_actor_judges_with_the_weights_that_it_has_now(
    tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    actor, other = counting(MARKS), counting(MARKS.replace("#", ""))
    spec, model = judged(words, checkpoint="actor"), actor.model
    with closing(open_task(spec, tokenizer, new_job("grpo"), actor=model)) as task:
        answers = [
            Rollout(row.id, "words", 0, [0], ids, [True] * len(ids), [0.0] * len(ids))
            for row, text in zip(task.train[:2], ("##", "#@"), strict=True)
            for ids in [tokenizer(text + EOS)["input_ids"]]
        ]
        before = [score.reward for score in task.score(answers)]
        load_weights(model, copy_weights(other.model))
        after = [score.reward for score in task.score(answers)]
    assert (before, after) == ([2 / 8, 2 / 8], [0.0, 1 / 8])


def test_an_actor_that_judges_itself_goes_on_to_the_same_bits(
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    tmp_path: Path,
) -> None:
    # it says `Score: 3` or `Score: ?` to everything, also as an answer
    saved(saying_either("Score: ", "37?"), tmp_path / "start" / "checkpoint")
    spec = judged(words, checkpoint="actor", temperature=1.0)
    config = stage([spec], num_steps=4, checkpoint_every=2)
    start = tmp_path / "start"
    straight, _ = check_killed(partial(grpo.work, config), new_job, cut_after, start=start, last=3)
    assert any(record["grad_norm"] > 0 for record in trained(straight))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A finished stage whose model ends its answers."""
    saved(saying_either("So: ", "#@abcd"), tmp_path / "marker" / "checkpoint")
    return tmp_path / "marker"


def test_an_actor_that_is_adapted_judges_with_its_adapter(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # the engine reads V4's weights as they are: an adapter has to be merged into them meanwhile
    model, _ = load_start(start / "checkpoint", LoraConfig(rank=2, alpha=8))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    spec = judged(words, checkpoint="actor", temperature=1.0)
    with closing(open_task(spec, tokenizer, new_job("grpo"), actor=model)) as task:
        judge: Any = task._judge_at
        assert isinstance(judge.new_engine(judge.model, num_slots=1, seed=0), AdaptedEngine)
        ids = task.train[0].id
        task.score([Rollout(ids, "words", 0, [0], [60, 1], [True] * 2, [0.0] * 2)])
    assert task.votes[0] == 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_group_that_differs_in_what_nobody_could_judge_has_no_spread() -> None:
    rollout = Rollout("p", "words", 0, [40], [60], [True], [0.0])
    scores = [Score(0.5, ""), Score(math.nan, ""), Score(0.5, "")]
    group = Group([rollout] * 3, scores, [0.0] * 3)
    assert group.spread == 0.0


def test_weights_that_nobody_could_judge_are_not_the_best(new_job: NewJob) -> None:
    model, scores = torch.nn.Linear(1, 1), iter([math.nan, 0.5, math.nan, 0.25])
    best = BestWeights(
        model,
        new_job("sft"),
        score=lambda _: {"validation_score": next(scores)},
        by_score=True,
    )
    for step in range(1, 5):
        state = TrainerState(global_step=step, max_steps=4)
        best.on_evaluate(TrainingArguments(), state, TrainerControl(), {"eval_loss": 1.0})
    assert best.restore() == 2


def test_best_of_n_takes_what_the_judge_likes_best(
    judges: Path, marker: Path, words: DomainSpec, new_job: NewJob
) -> None:
    how = BestOfConfig(num_prompts=8, samples_per_prompt=4, min_reward=0.1, num_steps=1)
    job = new_job("best_of", {"start": marker, "sampler": marker})
    best_of.work(BestOfStage(domain=judged(words), best_of=how), job)
    accepted = json.loads((job.out / "accepted.json").read_text())
    assert accepted["counts"]["judge_unparsed"] == 0
    assert accepted["counts"]["answers"] == 32
    assert all(answer["reward"] >= 1 / 8 for answer in accepted["answers"])


def test_best_of_n_takes_no_answer_that_nobody_could_judge(
    judges: Path, marker: Path, words: DomainSpec, new_job: NewJob
) -> None:
    how = BestOfConfig(num_prompts=8, samples_per_prompt=4, min_reward=0.1, num_steps=1)
    job = new_job("best_of", {"start": marker, "sampler": marker})
    spec = judged(words, checkpoint="mumbler", temperature=1.0)
    best_of.work(BestOfStage(domain=spec, best_of=how), job)
    accepted = json.loads((job.out / "accepted.json").read_text())
    assert 0 < accepted["counts"]["judge_unparsed"] < 32
    assert {answer["reward"] for answer in accepted["answers"]} <= {2 / 8, 6 / 8}
    assert 2 / 8 < accepted["counts"]["reward"] < 6 / 8


def test_best_of_n_is_judged_by_the_model_that_answers(
    words: DomainSpec, new_job: NewJob, tmp_path: Path
) -> None:
    saved(always_says("Score: 4"), tmp_path / "sampler" / "checkpoint")
    saved(always_says("Score: 6"), tmp_path / "start" / "checkpoint")
    how = BestOfConfig(num_prompts=4, samples_per_prompt=2, min_reward=0.1, num_steps=1)
    job = new_job("best_of", {"start": tmp_path / "start", "sampler": tmp_path / "sampler"})
    spec = judged(words.model_copy(update={"max_new_tokens": 16}), checkpoint="actor")
    best_of.work(BestOfStage(domain=spec, best_of=how), job)
    accepted = json.loads((job.out / "accepted.json").read_text())
    assert [answer["reward"] for answer in accepted["answers"]] == [3 / 8] * 4


@pytest.mark.parametrize(("says", "score"), [("Score: 4", 3 / 8), ("no", None)])
def test_validation_answers_are_judged_by_the_base(
    start: Path, words: DomainSpec, new_job: NewJob, tmp_path: Path, says: str, score: float | None
) -> None:
    # of the student that learns, as of all checkpoints that are compared, the base is the judge
    saved(always_says(says), tmp_path / "base" / "checkpoint")
    how = {
        "num_steps": 2,
        "rows_per_step": 4,
        "validation_share": 0.25,
        "validate_every": 1,
        "score": {"num_prompts": 2, "samples_per_prompt": 1},
        "best_by": "score",
    }
    config = SftStage(
        domains=[judged(words, checkpoint="actor")], sft=SftConfig.model_validate(how)
    )
    job = new_job("sft", {"start": start, "judge/words": tmp_path / "base"})
    sft.work(config, job)
    found = [r["validation_score"] for r in job.metrics.records() if "validation_score" in r]
    assert found == [score] * 2
    assert (job.out / "checkpoint" / "config.json").exists()
