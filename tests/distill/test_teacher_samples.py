"""What teachers sampled is theirs, is sampled once, and goes on after a kill."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_same_run, opd_stage, work_until

from distill.kept_rollouts import KeptRollouts
from distill.opd import work
from posttrain.checkpoints import load_model
from posttrain.job import Job
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout

TAUGHT = {"share": 0.5, "warmup_steps": 1, "prompts_per_domain": 3}


def kept(job: Job, steps: range) -> list[Rollout]:
    folder = KeptRollouts(job.out / "rollouts")
    return [rollout for step in steps for rollout in folder.find(step) or []]


def test_a_teachers_answers_are_its_own_and_come_again(
    make_job: Callable[[str], Job], stages: dict[str, Path]
) -> None:
    job = make_job("taught")
    work_until(opd_stage(teacher_samples=TAUGHT, checkpoint_every=9, prompts_per_step=8), job, 4)
    rollouts = kept(job, range(4))
    by_teacher = [r for r in rollouts if r.sampled_by]
    # a warm-up step of 4 + 4 rows, and half of three more
    assert [len(by_teacher), len(rollouts)] == [8 + 12, 32]
    assert {r.sampled_by for r in by_teacher} == {f"specialist/{r.domain}" for r in by_teacher}
    assert len({(r.prompt_id, tuple(r.response)) for r in by_teacher}) == 6  # 3 of each domain
    for name in {r.sampled_by for r in by_teacher}:
        model: Any = load_model(stages[name] / "checkpoint")
        for r in (r for r in by_teacher if r.sampled_by == name):
            with torch.no_grad():
                logits = model(torch.tensor([[*r.prompt, *r.response]])).logits[0].double()
            logp = logits.log_softmax(-1)[len(r.prompt) - 1 : -1]
            wanted = logp[range(len(r.response)), r.response]
            torch.testing.assert_close(torch.tensor(r.logp).double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_killed_run_learns_the_same_answers_to_the_same_bits(
    depth: int,
    make_job: Callable[[str], Job],
) -> None:
    asked = opd_stage(teacher_samples=TAUGHT, max_staleness=depth)
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    work_until(asked, broken, 1)
    work_until(asked, broken, 4)
    work(asked, broken)
    assert_same_run(broken, straight)
    first, second, *_ = straight.metrics.records()
    assert {name for name in first if name.startswith(("kl", "prompts"))} == set()
    for domain in ("mathematics", "code"):
        assert first[f"off_policy_prompts/{domain}"] == 3
        assert first[f"off_policy_divergence/{domain}"] > 0
        given = [r[f"off_policy_prompts/{domain}"] for r in straight.metrics.records()[1:]]
        own = [r[f"prompts/{domain}"] for r in straight.metrics.records()[1:]]
        assert sum(given) == 4  # of 9, the ninth not yet
        assert sum(own) == 5
        assert second[f"off_policy_kl/{domain}"] > 0
        assert f"off_policy_divergence/{domain}" not in second


def test_a_run_killed_while_a_teacher_answers_goes_on_from_its_tokens(
    make_job: Callable[[str], Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = opd_stage(teacher_samples=TAUGHT, num_steps=2, num_slots=2)
    straight, broken = make_job("straight"), make_job("killed")
    work(asked, straight)
    step = Engine.step
    taken: list[int] = []

    def counted(engine: Engine) -> Any:
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            work(asked, broken)
    (journal,) = (broken.out / "rollouts" / "teachers").glob("*.journal")
    assert b"tokens" in journal.read_bytes()
    work(asked, broken)
    assert_same_run(broken, straight)


def test_a_mixtures_prompts_are_answered_by_each_of_its_teachers(
    make_job: Callable[[str], Job],
) -> None:
    job = make_job("mixed")
    both = {"specialist/mathematics": 1.0, "specialist/code": 1.0}
    asked = opd_stage(
        teacher_samples={"share": 0.5, "prompts_per_domain": 8}, prompts_per_step=32
    ).model_copy(update={"teachers": {"mathematics": both, "code": "base"}})
    work_until(asked, job, 1)
    by = {r.sampled_by for r in kept(job, range(1)) if r.domain == "mathematics"}
    assert by == {"", *both}
    assert {r.sampled_by for r in kept(job, range(1)) if r.domain == "code"} == {"", "base"}


def test_teachers_answers_alone_bring_the_student_closer_on_its_own(
    make_job: Callable[[str], Job],
) -> None:
    plain, warm = make_job("plain"), make_job("warm")
    optimizer = {"name": "adamw", "learning_rate": 1e-2}
    size: dict[str, Any] = {"prompts_per_step": 16, "num_slots": 16, "optimizer": optimizer}
    work(opd_stage(num_steps=1, **size), plain)
    work(opd_stage(num_steps=11, teacher_samples={"warmup_steps": 10}, **size), warm)
    before, after = plain.metrics.records()[0], warm.metrics.records()[-1]
    for domain in ("mathematics", "code"):
        assert after[f"kl/{domain}"] < 0.6 * before[f"kl/{domain}"]
