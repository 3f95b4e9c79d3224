"""Teachers come, go and weigh more or less between two steps, and a resume repeats it."""

import json
import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import OpdStage
from distill.opd import work
from distill.roster import EDITED, RECORDED, Entry, Roster, Rosters, roster_at
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.metrics import Metrics

DOMAINS = ("mathematics", "code")


def stage(**distill: Any) -> OpdStage:
    return OpdStage.model_validate(
        {
            "domains": [
                {"name": name, "data": {"jsonl": f"{name}.jsonl"}, "reward": "exact",
                 "max_new_tokens": 4}
                for name in DOMAINS
            ],
            "distill": {
                "num_steps": 5, "prompts_per_step": 6, "num_slots": 4, "checkpoint_every": 2,
                "optimizer": {"learning_rate": 1e-3}, **distill,
            },
            "teachers": {name: f"specialist/{name}" for name in DOMAINS},
        }
    )  # fmt: skip


class School:
    """Hires who is on its list."""

    def __init__(self, *names: str) -> None:
        self.names = set(names) | {f"specialist/{name}" for name in DOMAINS}
        self.hired: set[str] = set()

    def hire(self, names: Iterable[str]) -> None:
        """As `Teachers.hire`."""
        for name in names:
            if name not in self.names:
                raise CheckpointError(f"{name} holds no checkpoint")
            self.hired.add(name)


def edit(folder: Path, text: str) -> None:
    (folder / EDITED).write_text(text, encoding="utf-8")


SECOND = """
version: 2
teachers:
  mathematics: {specialist/mathematics: 1, new: 3}
shares: {mathematics: 2}
"""


def test_the_roster_of_a_step_is_the_last_that_began_by_then() -> None:
    first, second, third = (Roster(version=v, teachers={"a": "t"}) for v in (1, 2, 5))
    history = [Entry(0, first), Entry(4, second), Entry(7, third)]
    found = [roster_at(history, step).version for step in range(9)]
    assert found == [1, 1, 1, 1, 2, 2, 2, 5, 5]


def test_an_edit_holds_from_the_next_step_and_is_repeated_after_a_resume(tmp_path: Path) -> None:
    school = School("new", "newer")
    rosters = Rosters(stage(), tmp_path, hire=school.hire)
    assert rosters.at(0) == (stage(), 1)  # as the recipe has it
    edit(tmp_path, SECOND)
    now, version = rosters.at(1)
    assert version == 2
    assert now.mixtures == {"mathematics": {"specialist/mathematics": 0.25, "new": 0.75}}
    assert now.shares == {"mathematics": 2.0}
    assert "new" in school.hired
    edit(tmp_path, SECOND.replace("version: 2", "version: 7").replace("new", "newer"))
    resumed = Rosters(stage(), tmp_path, hire=school.hire)  # killed after step 1, from step 0 on
    assert [resumed.at(step)[1] for step in range(4)] == [1, 2, 7, 7]
    again = Rosters(stage(), tmp_path, hire=school.hire)
    assert [again.at(step)[1] for step in range(4)] == [1, 2, 7, 7]
    assert "newer" in again.at(2)[0].teacher_names


def test_an_edit_made_after_a_kill_holds_after_the_steps_that_were_begun(tmp_path: Path) -> None:
    school = School("new")
    Rosters(stage(), tmp_path, hire=school.hire).at(0)
    edit(tmp_path, SECOND)  # killed in step 3, and goes on from step 1
    resumed = Rosters(stage(), tmp_path, hire=school.hire, begun=3)
    assert [resumed.at(step)[1] for step in range(1, 6)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version: 2\nteachers: {mathematics: [", "while parsing"),
        ("just words", "valid dictionary"),
        ("version: 2\nteachers: {}", "teachers: "),
        ("version: 2\nteachers: {history: new}", r"the domains \['history'\]"),
        ("version: 2\nteachers: {mathematics: {new: -1}}", "weights above 0"),
        ("version: 2\nteachers: {mathematics: new}\nshares: {mathematics: 0}", "weights above 0"),
        ("version: 2\nteachers: {mathematics: new}\nshares: {code: 1}", "domain_shares names"),
        ("version: 2\nteachers: {mathematics: new}\nsahres: {}", "sahres"),
        ("version: 1\nteachers: {mathematics: new}", "raise it above 1"),
        ("version: 2\nteachers: {mathematics: nowhere}", "nowhere holds no checkpoint"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_an_edit_that_cannot_be_is_told_once_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | bytes, problem: str
) -> None:
    rosters = Rosters(stage(), tmp_path, hire=School("new").hire)
    before = (tmp_path / RECORDED).read_text()
    (tmp_path / EDITED).write_bytes(text.encode() if isinstance(text, str) else text)
    with caplog.at_level(logging.WARNING):
        assert [rosters.at(step) for step in (1, 2)] == [(stage(), 1)] * 2
    (record,) = caplog.records
    assert "until it is mended" in record.getMessage()
    assert re.search(problem, record.getMessage())
    assert (tmp_path / RECORDED).read_text() == before
    edit(tmp_path, SECOND)
    assert rosters.at(3)[1] == 2


def test_a_file_that_was_deleted_changes_nothing(tmp_path: Path) -> None:
    rosters = Rosters(stage(), tmp_path, hire=School().hire)
    (tmp_path / EDITED).unlink()
    assert rosters.at(1) == (stage(), 1)


class Edits(Metrics):
    """Metrics of a run whose user edits the roster after a step, and which may be killed."""

    def __init__(self, path: Path, *, text: str, killed_at: int | None = None) -> None:
        super().__init__(path, stage="opd")
        self.text, self.killed_at = text, killed_at

    def log(self, step: int, total: int, **values: float | int | str) -> None:
        """Dies, or logs."""
        if step == self.killed_at:
            raise KeyboardInterrupt
        super().log(step, total, **values)
        if step == 3:
            edit(self.path.parent, self.text)


@pytest.mark.parametrize(
    ("max_staleness", "killed_at", "versions"),
    [
        (0, 4, [1, 1, 1, 2, 2]),  # the fourth step is taken, and lost
        (1, 3, [1, 1, 1, 1, 2]),  # it is sampled before the edit, which is made after the kill
    ],
)
def test_a_run_whose_teachers_change_goes_on_from_a_kill_to_the_same_bits(
    stages: dict[str, Path],
    tmp_path: Path,
    max_staleness: int,
    killed_at: int,
    versions: list[int],
) -> None:
    for domain in DOMAINS:
        rows = [{"prompt": f"{domain} {i}", "answer": str(i)} for i in range(12)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shutil.copytree(stages["base"] / "checkpoint", tmp_path / "new")
    text = SECOND.replace("teachers:\n", "teachers:\n  code: new\n")

    def job(name: str, **edits: Any) -> Job:
        (tmp_path / name).mkdir(exist_ok=True)
        metrics = Edits(tmp_path / name / "metrics.jsonl", text=text, **edits)
        return Job(tmp_path / name, stages, tmp_path, seed=0, num_threads=1, metrics=metrics)

    schedule = stage(max_staleness=max_staleness)
    work(schedule, job("straight"))
    with pytest.raises(KeyboardInterrupt):
        work(schedule, job("killed", killed_at=killed_at))
    resumed = job("killed")
    edit(tmp_path / "killed", text)
    work(schedule, replace(resumed, metrics=Metrics(resumed.metrics.path, stage="opd")))
    one, two = (load_model(tmp_path / name / "checkpoint") for name in ("straight", "killed"))
    other = two.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())
    records = [
        json.loads(x) for x in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()
    ]
    assert [record["roster"] for record in records] == versions
    assert records[4]["share/mathematics"] != records[2]["share/mathematics"]
    assert json.loads((tmp_path / "killed" / "teachers.json").read_text()).keys() >= {"new"}
