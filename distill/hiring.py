"""Before the first step: which checkpoint each teacher is, that it speaks the student's tokens,
that it is the one the run began with, and the pool that holds it."""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from distill.config import OpdStage
from distill.hidden_store import HiddenStore
from distill.mesh import own_device
from distill.reverse_kl import Head
from distill.teacher_adapters import check_adapter
from distill.teacher_files import Place, find_teacher
from distill.teacher_models import Loader, load_config, stable
from distill.teachers import Teacher, Teachers
from posttrain.checkpoints import load_model, load_tokenizer, weights_hash
from posttrain.errors import CheckpointError
from posttrain.files import write_atomic
from posttrain.hashes import FileHashes
from posttrain.job import Job
from posttrain.tokenizer import check_same_tokens

PINNED = "teachers.json"
HASHES = "hashes.json"
"""Remembered of the teachers' files: a resume does not read hundreds of gigabytes to find that they
are the same."""


def open_pool(stage: OpdStage, student: Any, tokenizer: Any, job: Job) -> Teachers:
    """One pool for all teachers, those of later rosters too; `hire` has each examined by name."""
    config = stage.distill
    # the other learner ranks need processes to themselves: a process is in one torch group
    num_free = job.num_places - (config.learners.num_ranks - 1)
    num_workers = max(1, min(config.num_teacher_workers, num_free))
    meeting = job.out.resolve() / f"teachers-{secrets.token_hex(4)}.tmp"
    pool = [
        job.role(
            "distill.teachers:TeacherPool",
            {
                "capacity": config.num_resident_teachers,
                "max_gb": config.teachers_memory_gb or math.inf,
                "dtype": config.teacher_dtype,
                "rank": rank,
                "num_workers": num_workers,
                "meeting": meeting,
                "timeout_s": config.teacher_timeout_s,
            },
        )
        for rank in range(num_workers)
    ]
    return Teachers(
        pool,
        Examiner(student, tokenizer, job, dtype=config.teacher_dtype),
        store=HiddenStore(job.out / "hidden", memory_bytes=int(config.hidden_memory_gb * 1e9)),
        rows_per_batch=config.rows_per_microbatch,
        timeout_s=config.teacher_timeout_s,
    )


class Examiner:
    """Tells whether a teacher can teach the student, and who it is."""

    def __init__(self, student: Any, tokenizer: Any, job: Job, *, dtype: str) -> None:
        self._vocab_size = len(student.get_output_embeddings().weight)
        self._tokenizer = tokenizer
        self._job = job
        self._dtype = dtype
        self._hashes = FileHashes(job.out / HASHES)
        self._loader = Loader(dtype=torch.float32, device="cpu")

    def __call__(self, name: str) -> Teacher:
        """The teacher of this name, pinned: from now on it is this one. Raises CheckpointError or
        TokenizerMismatch, by name, where it cannot teach or is another than it was."""
        folder = teacher_folder(name, self._job)
        place = find_teacher(folder)
        tokenizers = [load_tokenizer(place.base)]
        if place.adapter:
            check_adapter(place.adapter, self._loader.skeleton(place.base))
            if (place.adapter / "tokenizer.json").exists():
                tokenizers.append(AutoTokenizer.from_pretrained(place.adapter))
        for tokenizer in tokenizers:
            check_same_tokens(self._tokenizer, tokenizer, name=name)
        head = self._loader.head(place.base)
        if len(head.weight) != self._vocab_size:
            raise CheckpointError(
                f"teacher {name!r} has a head of {len(head.weight)} tokens and the student one of "
                f"{self._vocab_size}: the KL is over the whole vocabulary, so pad or cut one"
            )
        found = identify(place, head, tokenizers[0], self._hashes)
        pin(self._job.out / PINNED, name, found)
        summary = json.dumps([found, self._dtype], sort_keys=True)
        return Teacher(
            name,
            folder,
            identity=hashlib.sha256(summary.encode()).hexdigest(),
            hidden_size=head.weight.shape[1],
            itemsize=getattr(torch, self._dtype).itemsize,
        )


def teacher_folder(name: str, job: Job) -> Path:
    """A stage input's checkpoint, or a path relative to the recipe."""
    if name in job.inputs:
        return job.inputs[name] / "checkpoint"
    return (job.folder / name).resolve()


def load_teacher(name: str, job: Job) -> Any:
    """The whole model, to sample with: beside the student, and gone after a kill whose resume finds
    what it sampled, so that torch's generator is left as it was."""
    with torch.random.fork_rng():
        model: Any = load_model(teacher_folder(name, job))
    model.to(own_device())
    return model


def identify(
    place: Place, head: Head, tokenizer: Any, hashes: FileHashes | None = None
) -> dict[str, str]:
    """Hashes by part: all that decides what a teacher says of a token."""
    config = json.dumps(stable(load_config(place.base).to_dict()), sort_keys=True, default=str)
    tokens = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = {
        "weights": weights_hash(place.base, hashes),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
        "head": hash_head(head),
    }
    if place.adapter:
        settings = (place.adapter / "adapter_config.json").read_bytes()
        digest = hashlib.sha256(settings + weights_hash(place.adapter, hashes).encode())
        parts["adapter"] = digest.hexdigest()
    return parts


def hash_head(head: Head) -> str:
    """sha256 of a head's numbers."""
    digest = hashlib.sha256(f"{head.scale}".encode())
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pin(path: Path, name: str, found: Mapping[str, str]) -> None:
    """Write down who a teacher is, or compare it with what an earlier attempt wrote. Raises
    CheckpointError, naming it and what differs."""
    pinned = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = pinned.setdefault(name, dict(found))
    differing = [
        part for part in sorted(before.keys() | found.keys()) if before.get(part) != found.get(part)
    ]
    if differing:
        changes = ", ".join(
            f"{part} {before.get(part, 'none')[:12]} then, {found.get(part, 'none')[:12]} now"
            for part in differing
        )
        raise CheckpointError(
            f"teacher {name!r} is another than when this run began ({changes}): put the first one "
            f"back, or delete {path.parent} to distil anew"
        )
    write_atomic(path, json.dumps(pinned, indent=1, sort_keys=True))
