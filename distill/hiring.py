"""Before the first step: which checkpoint each teacher is, that it speaks the student's tokens,
that it is the one the run began with, and the pool that holds it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import OpdStage
from distill.teachers import Teachers
from posttrain.checkpoints import load_tokenizer, weights_hash
from posttrain.errors import CheckpointError
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.tokenizer import check_same_tokens


def hire_teachers(stage: OpdStage, student_tokenizer: Any, job: Job) -> Teachers:
    """The stage's teachers, checked, in one pool.

    Raises TokenizerMismatch for a teacher of other tokens, CheckpointError for one that changed.
    """
    config = stage.distill
    folders = {name: teacher_folder(name, job) for name in stage.teacher_names}
    for name, folder in folders.items():
        check_same_tokens(student_tokenizer, load_tokenizer(folder), name=name)
    pin_teachers(job.out / "teachers.json", folders)
    pool = job.role(
        "distill.teachers:TeacherPool",
        {
            "teachers": {name: str(folder) for name, folder in folders.items()},
            "capacity": config.num_resident_teachers,
            "rows_per_batch": config.rows_per_microbatch,
        },
    )
    return Teachers(
        pool, num_heads=config.num_resident_teachers, timeout_s=config.teacher_timeout_s
    )


def teacher_folder(name: str, job: Job) -> Path:
    """A stage input's checkpoint, or a path relative to the recipe."""
    if name in job.inputs:
        return job.inputs[name] / "checkpoint"
    return (job.folder / name).resolve()


def pin_teachers(path: Path, folders: Mapping[str, Path]) -> None:
    """Writes the teachers' identities, hashes of weights and tokenizer, or compares them with what
    an earlier attempt wrote. Raises CheckpointError, naming the teacher, where one differs."""
    found = {name: weights_hash(folder) for name, folder in folders.items()}
    if not path.exists():
        write_atomic(path, json.dumps(found, indent=1))
        return
    pinned = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(pinned.keys() | found.keys()):
        if pinned.get(name) != found.get(name):
            raise CheckpointError(
                f"teacher {name!r} was {str(pinned.get(name, 'absent'))[:12]} when this run began "
                f"and is {str(found.get(name, 'absent'))[:12]} now: put the first one back, or "
                f"delete {path.parent} to distil anew"
            )
