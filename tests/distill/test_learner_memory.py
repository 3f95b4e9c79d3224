"""What a learner holds at once: a teacher's head, a micro-batch's hidden states."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_learner import SHARES, TEACHERS, VOCAB, descent, examples, scored

from distill.batch import ScoredExample
from distill.hidden_store import HiddenRow, write_row
from distill.learner import Learner
from distill.teachers import Recent


def learner(make_model: Callable[..., Any], head: Callable[[str], Any]) -> Learner:
    model = make_model(0, VOCAB)
    return Learner(model, descent(0.0), shares=SHARES, head=head, rows_per_microbatch=1)


def test_one_resident_head_is_loaded_once_a_step_for_each_teacher(
    make_model: Callable[..., Any],
) -> None:
    teachers = {name: make_model(i, VOCAB) for i, name in enumerate("abc", start=1)}
    rows = [replace(r, teachers={"abc"[i % 3]: 1.0}) for i, r in enumerate(examples() * 2)]
    loaded: list[str] = []

    def load(name: str) -> torch.Tensor:
        loaded.append(name)
        return teachers[name].get_output_embeddings().weight

    ours = learner(make_model, Recent(load, capacity=1))
    for step in (1, 2):  # ten micro-batches in each
        ours.step(scored(rows, teachers))
        assert loaded == ["a", "b", "c"] * step


def test_hidden_states_are_read_when_their_microbatch_comes(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    teachers = {name: make_model(i, VOCAB) for i, name in enumerate(TEACHERS.values(), start=1)}
    events: list[str] = []

    class Noted(HiddenRow):
        def read(self) -> torch.Tensor:
            events.append("read")
            return super().read()

    def head(name: str) -> torch.Tensor:
        events.append("learn")
        return teachers[name].get_output_embeddings().weight

    rows: list[ScoredExample] = []
    for number, row in enumerate(scored(examples(), teachers)):
        (name,) = row.example.teachers
        write_row(tmp_path / str(number), row.hidden(name))
        rows.append(ScoredExample(row.example, {name: Noted(str(tmp_path / str(number)))}))
    learner(make_model, head).step(rows)
    assert events == ["read", "learn"] * len(rows)
