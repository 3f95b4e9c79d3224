"""Whole distillations at the smallest size: they learn, and go on from a kill to the same bits."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from small_runs import (
    DOMAINS,
    assert_same_run,
    assert_same_weights,
    opd_stage,
    without_time,
    work_until,
)

from distill.batch import Example, ScoredExample
from distill.mesh import Mesh
from distill.opd import open_tasks, work
from distill.rollouts import read_along
from distill.roster import EDITED, RECORDED
from posttrain.checkpoints import load_model, load_tokenizer, save_checkpoint
from posttrain.domains import is_heldout, overlap
from posttrain.domains.config import DecontaminateConfig
from posttrain.errors import (
    CheckpointError,
    InsufficientResources,
    StageError,
    TokenizerMismatch,
)
from posttrain.job import Job
from posttrain.rollout.types import Request, Rollout
from posttrain.tokenizer import build_tokenizer

HOME = Path(__file__).resolve().parents[2]
DOMAIN_TEACHERS = [f"specialist/{domain}" for domain in DOMAINS]


@pytest.mark.parametrize("schedule", [{}, {"max_staleness": 1}, {"max_staleness": 2}])
def test_a_killed_run_goes_on_to_the_same_bits(
    make_job: Callable[[str], Job], schedule: dict[str, Any]
) -> None:
    straight, killed = make_job("straight"), make_job("killed")
    work(opd_stage(**schedule), straight)
    for step in (1, 4):  # before the first step checkpoint, and between two
        work_until(opd_stage(**schedule), killed, step)
    work(opd_stage(**schedule), killed)
    assert_same_run(killed, straight)
    left = {path.name for path in killed.out.iterdir()}
    assert left == {"checkpoint", "metrics.jsonl", "teachers.json", EDITED, RECORDED}


@pytest.mark.parametrize("depth", [0, 2])
def test_a_step_learns_from_weights_that_many_versions_old(
    make_job: Callable[[str], Job], depth: int
) -> None:
    job = make_job("stale")
    work(opd_stage(max_staleness=depth), job)
    assert [r["staleness"] for r in job.metrics.records()] == [min(s, depth) for s in range(4)]


def test_workers_with_copies_of_the_weights_change_no_bit(make_job: Callable[[str], Job]) -> None:
    one, other = make_job("colocated"), make_job("separate")
    work(opd_stage(num_steps=3), one)
    work(opd_stage(num_steps=3, num_rollout_workers=1), other)
    assert_same_run(other, one)


@pytest.mark.ray
def test_roles_in_processes_of_their_own_change_no_bit(make_job: Callable[[str], Job]) -> None:
    schedules: list[dict[str, Any]] = [{}, {"max_staleness": 1}, {"num_teacher_workers": 2}]
    here = [make_job(f"here{i}") for i in range(2)]
    apart = [make_job(f"apart{i}") for i in range(3)]
    for job, schedule in zip(here, schedules[:2], strict=True):
        work(opd_stage(num_steps=3, **schedule), job)
    told = [
        {
            "stage": opd_stage(num_steps=3, num_rollout_workers=1, **schedule).model_dump(
                mode="json"
            ),
            "out": str(job.out),
            "inputs": {role: str(path) for role, path in job.inputs.items()},
            "folder": str(job.folder),
            "num_places": num_places,
        }
        for job, schedule, num_places in zip(apart, schedules, (2, 2, 3), strict=True)
    ]
    script = Path(__file__).with_name("apart.py")
    here_first = {**os.environ, "PYTHONPATH": str(HOME)}
    subprocess.run([sys.executable, str(script), json.dumps(told)], check=True, env=here_first)
    for one, other in zip([*here, here[0]], apart, strict=True):
        assert_same_run(other, one)


def test_a_run_that_was_killed_after_its_last_save_does_nothing(
    make_job: Callable[[str], Job],
) -> None:
    job = make_job("done")
    work(opd_stage(num_steps=1), job)
    records = job.metrics.records()
    work(opd_stage(num_steps=1), job)
    assert job.metrics.records() == records


def test_the_student_comes_closer_to_every_teacher(make_job: Callable[[str], Job]) -> None:
    job = make_job("learning")
    optimizer = {"name": "adamw", "learning_rate": 1e-2}
    work(opd_stage(num_steps=12, prompts_per_step=16, num_slots=16, optimizer=optimizer), job)
    first, last = job.metrics.records()[0], job.metrics.records()[-1]
    for domain in DOMAINS:
        assert last[f"kl/{domain}"] < 0.5 * first[f"kl/{domain}"]


def test_several_teachers_and_the_base_are_read_and_logged_each(
    make_job: Callable[[str], Job],
) -> None:
    job = make_job("mixed")
    teachers = {
        "mathematics": {"specialist/mathematics": 3, "specialist/code": 1},
        "code": "specialist/code",
    }
    work(opd_stage(num_steps=1, kl_to_base=0.5, start="base", teachers=teachers), job)
    (found,) = job.metrics.records()
    maths = {name: found[f"kl/mathematics/{name}"] for name in (*DOMAIN_TEACHERS, "base")}
    assert maths["base"] == pytest.approx(0, abs=1e-6)  # where the student starts
    wanted = 0.75 * maths["specialist/mathematics"] + 0.25 * maths["specialist/code"]
    assert found["kl/mathematics"] == pytest.approx(wanted, rel=1e-4)
    assert found["kl/code"] == pytest.approx(found["kl/code/specialist/code"], rel=1e-4)
    assert "kl/code/specialist/mathematics" not in found


def test_an_ablation_logs_what_it_minimises_beside_the_reverse_kl(
    make_job: Callable[[str], Job],
) -> None:
    whole, ablation = make_job("whole"), make_job("ablation")
    work(opd_stage(num_steps=1), whole)
    work(opd_stage(num_steps=1, divergence={"kind": "jsd", "beta": 0.9}), ablation)
    (wanted,), (found,) = whole.metrics.records(), ablation.metrics.records()
    for domain in DOMAINS:
        assert found[f"kl/{domain}"] == pytest.approx(wanted[f"kl/{domain}"], rel=1e-5)
    assert found["loss"] == pytest.approx(
        sum(found[f"divergence/{domain}"] for domain in DOMAINS) / 2, rel=1e-6
    )
    assert found["loss"] < 0.5 * wanted["loss"]  # 0.9 KL(q || m) + 0.1 KL(p || m), m nearly q


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """`spikes({3, 4})`: the gradients of steps 3 and 4, counted from 1, are not finite."""

    def make(at: set[int]) -> None:
        clip = Mesh.clip_grad_norm
        steps = iter(range(1, 1000))

        def norm(mesh: Mesh, *given: Any) -> torch.Tensor:
            return clip(mesh, *given) * (float("nan") if next(steps) in at else 1.0)

        monkeypatch.setattr(Mesh, "clip_grad_norm", norm)

    return make


def test_a_bad_gradient_leaves_the_weights_as_they_were_and_the_run_goes_on(
    make_job: Callable[[str], Job], spikes: Callable[[set[int]], None]
) -> None:
    short, skipping = make_job("short"), make_job("skipping")
    constant = {"learning_rate": 1e-3}
    work(opd_stage(num_steps=2, optimizer=constant), short)
    spikes({3})
    work(opd_stage(num_steps=3, optimizer=constant), skipping)
    assert_same_weights(skipping, short)
    assert [r["updates_skipped"] for r in skipping.metrics.records()] == [0, 0, 1]
    assert skipping.metrics.records()[-1]["grad_norm"] is None


def test_bad_gradients_in_a_row_go_back_to_the_last_checkpoint_and_then_stop(
    make_job: Callable[[str], Job], spikes: Callable[[set[int]], None]
) -> None:
    short, job = make_job("short"), make_job("job")
    config: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}, "guard": {"max_skipped": 2}}
    work(opd_stage(num_steps=2, **config), short)
    spikes({4, 5})  # step 3 is an update that is lost: the last checkpoint was after step 2
    work(opd_stage(num_steps=5, **config), job)
    assert_same_weights(job, short)
    assert [r["rolled_back"] for r in job.metrics.records()] == [0, 0, 0, 0, 1]
    again = make_job("again")
    spikes({2, 3, 4, 5})
    with pytest.raises(StageError, match=r"lower distill.optimizer.learning_rate"):
        work(opd_stage(num_steps=9, **config), again)
    assert [r["step"] for r in again.metrics.records()] == [1, 2, 3, 4]


def test_a_run_killed_after_it_went_back_goes_on_to_the_same_bits(
    make_job: Callable[[str], Job], spikes: Callable[[set[int]], None]
) -> None:
    straight, killed = make_job("straight"), make_job("killed")
    config: dict[str, Any] = {"num_steps": 8, "guard": {"max_skipped": 2}}
    spikes({4, 5})
    work(opd_stage(**config), straight)
    spikes({4, 5})
    work_until(opd_stage(**config), killed, 8)
    work(opd_stage(**config), killed)  # from step 6: nothing is bad there
    assert_same_weights(killed, straight)
    assert killed.metrics.records()[-1]["rolled_back"] == 1


def test_a_student_that_starts_as_its_teacher_has_nothing_to_learn(
    make_job: Callable[[str], Job],
) -> None:
    job = make_job("twin")
    teachers = dict.fromkeys(DOMAINS, "specialist/code")
    work(opd_stage(num_steps=1, start="specialist/code", teachers=teachers), job)
    assert job.metrics.records()[0]["loss"] == pytest.approx(0, abs=1e-6)


def test_the_number_of_slots_changes_no_sampled_token(make_job: Callable[[str], Job]) -> None:
    few, many = make_job("few"), make_job("many")
    work(opd_stage(num_steps=1, num_slots=1), few)
    work(opd_stage(num_steps=1, num_slots=16), many)
    for one, other in zip(few.metrics.records(), many.metrics.records(), strict=True):
        lengths = {key for key in one if key.startswith(("length/", "tokens/", "truncated/"))}
        assert lengths
        assert all(one[key] == other[key] for key in lengths)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_resume_with_another_teacher_is_refused_by_name(
    make_job: Callable[[str], Job], stages: dict[str, Path], tmp_path: Path
) -> None:
    job = make_job("swapped")
    shutil.copytree(stages["specialist/code"] / "checkpoint", tmp_path / "teacher")
    teachers = {"mathematics": "specialist/mathematics", "code": "teacher"}
    work_until(opd_stage(teachers=teachers), job, 4)
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(stages["base"] / "checkpoint", tmp_path / "teacher")
    with pytest.raises(CheckpointError, match="teacher 'teacher' is another than when this"):
        work(opd_stage(teachers=teachers), job)


def test_a_teacher_of_other_tokens_is_refused_before_any_step(
    make_job: Callable[[str], Job], stages: dict[str, Path], tmp_path: Path
) -> None:
    job, folder = make_job("tokens"), tmp_path / "teacher"
    tokenizer = load_tokenizer(stages["base"] / "checkpoint")
    tokenizer.add_tokens(["a new word"])
    save_checkpoint(load_model(stages["base"] / "checkpoint"), tokenizer, folder)
    with pytest.raises(TokenizerMismatch, match="'a new word'"):
        work(opd_stage(teachers={"mathematics": "specialist/mathematics", "code": "teacher"}), job)
    assert job.metrics.records() == []


def test_scores_change_no_weight_and_count_the_tokens_seen(make_job: Callable[[str], Job]) -> None:
    plain, scored = make_job("plain"), make_job("scored")
    work(opd_stage(num_steps=3), plain)
    work(opd_stage(num_steps=3, evaluate_every=2, evaluate_prompts=2, evaluate_samples=3), scored)
    assert_same_weights(scored, plain)
    records = {record["step"]: record for record in without_time(scored)}
    assert [step for step in records if "score/macro" in records[step]] == [0, 2, 3]
    assert records[0]["tokens_seen"] == 0
    for step, without in enumerate(without_time(plain), start=1):
        learned = sum(value for name, value in without.items() if name.startswith("tokens/"))
        assert without["tokens_seen"] - records[step - 1]["tokens_seen"] == learned
        assert without == {name: records[step][name] for name in without}


def test_a_killed_run_scores_again_to_the_same_numbers(make_job: Callable[[str], Job]) -> None:
    straight, killed = make_job("straight"), make_job("killed")
    work(opd_stage(evaluate_every=1), straight)
    for step in (1, 4):
        work_until(opd_stage(evaluate_every=1), killed, step)
    work(opd_stage(evaluate_every=1), killed)
    assert without_time(killed) == without_time(straight)


class Echo:
    """In an engine's and the teachers' place: says one token, and reads without a word."""

    def run(self, requests: list[Request]) -> Iterator[Rollout]:
        for r in reversed(requests):
            yield Rollout(r.prompt_id, r.domain, 0, r.prompt, [7], [True], [0.0])

    def ask(
        self, examples: list[Example], *, step: int, then: str | None
    ) -> Callable[[], list[ScoredExample]]:
        return lambda: [
            ScoredExample(e, {name: torch.zeros(1, 2) for name in e.teachers}) for e in examples
        ]


def test_a_rollout_names_the_teacher_that_read_it() -> None:
    requests = [Request(f"p{i}", [5, 6], domain=DOMAINS[i % 2]) for i in range(4)]
    teacher_of = {"mathematics": "specialist/mathematics", "code": "elsewhere"}
    echo: Any = Echo()
    mixtures = {domain: {name: 1.0} for domain, name in teacher_of.items()}
    batch = read_along(echo.run(requests), requests, mixtures, echo, step=0)
    assert len(batch.rollouts) == 4
    assert all(rollout.teacher == teacher_of[rollout.domain] for rollout in batch.rollouts)
    names = [[*row.example.teachers] for row in batch.rows()]
    assert names == [[rollout.teacher] for rollout in batch.rollouts]


def test_the_order_in_which_rollouts_finish_changes_no_batch() -> None:
    requests = [Request(f"p{i}", [5, 6 + i], domain=DOMAINS[i % 2]) for i in range(8)]
    mixtures = {domain: {"teacher": 1.0} for domain in DOMAINS}
    echo: Any = Echo()
    one, other = (
        read_along(order(echo.run(requests)), requests, mixtures, echo, step=0)
        for order in (list[Rollout], lambda rollouts: reversed(list(rollouts)))
    )
    assert other.rollouts == one.rollouts
    assert [row.example for row in other.rows()] == [row.example for row in one.rows()]


def test_narrow_teachers_beside_a_learner_that_samples_ahead_are_refused(
    make_job: Callable[[str], Job],
) -> None:
    with pytest.raises(InsufficientResources, match=r"raise cluster\.num_workers to 2"):
        work(opd_stage(max_staleness=1, teacher_dtype="bfloat16"), make_job("refused"))


def test_no_domain_is_distilled_on_a_prompt_near_a_tests(make_job: Callable[[str], Job]) -> None:
    job, rng = make_job("opd"), Random(4)
    texts = [" ".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(64)]
    held = [text for text in texts if is_heldout([{"role": "user", "content": text}], 0.125)]
    near = {f"{text} z" for text in held}
    near = {text for text in near if not is_heldout([{"role": "user", "content": text}], 0.125)}
    lines = [json.dumps({"prompt": text, "answer": "1"}) for text in (*texts, *near)]
    (job.folder / "mathematics.jsonl").write_text("\n".join(lines))
    stage = opd_stage()
    clean = stage.domains[0].model_copy(update={"decontaminate": DecontaminateConfig(num_words=4)})
    stage = stage.model_copy(update={"domains": [clean, stage.domains[1]]})
    with open_tasks(stage, build_tokenizer(), job) as tasks:
        learned = {row.messages[-1]["content"] for row in tasks["mathematics"].train}
    assert learned == set(texts) - set(held)
    told = overlap.told(job.out)
    assert told.keys() == {"mathematics"}
    assert {pair["train"] for pair in told["mathematics"]["pairs"]} == near
    assert near
