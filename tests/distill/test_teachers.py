"""The pool answers with what each teacher computes for a row alone, however it is asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import teachers
from distill.batch import Example
from distill.causal_lm import hidden_states
from distill.teachers import Recent, ScoreRequest, TeacherPool, Teachers, from_wire, to_wire
from posttrain.checkpoints import load_model
from posttrain.job import LocalRole

NAMES = ("specialist/mathematics", "specialist/code")


@pytest.fixture
def folders(stages: dict[str, Path]) -> dict[str, Path]:
    return {name: stages[name] / "checkpoint" for name in NAMES}


def requests(count: int = 7) -> list[ScoreRequest]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (count,), generator=generator).tolist()
    return [
        ScoreRequest(
            row,
            NAMES[row % 2],
            torch.randint(3, 200, (length,), generator=generator).tolist(),
            positions=[0, length - 1],
        )
        for row, length in enumerate(lengths)
    ]


def alone(folders: dict[str, Path], request: ScoreRequest) -> Tensor:
    model = load_model(folders[request.teacher])
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([request.input_ids])).last_hidden_state
    return hidden[0, request.positions]


@pytest.mark.parametrize("rows_per_batch", [1, 3, 64])
def test_hidden_states_are_those_of_the_unpadded_row(
    folders: dict[str, Path], rows_per_batch: int
) -> None:
    found = TeacherPool(folders, rows_per_batch=rows_per_batch, device="cpu").score(requests())
    assert found.keys() == set(range(7))
    for request in requests():
        wanted = alone(folders, request)
        torch.testing.assert_close(from_wire(found[request.row]), wanted, rtol=0, atol=2e-5)


def test_the_order_of_requests_and_the_teachers_in_memory_change_no_bit(
    folders: dict[str, Path],
) -> None:
    whole = TeacherPool(folders, device="cpu").score(requests())
    one = TeacherPool(folders, capacity=1, device="cpu").score(requests()[::-1])
    assert all((whole[row] == one[row]).all() for row in whole)


def test_the_head_is_the_teachers_own(folders: dict[str, Path]) -> None:
    pool = TeacherPool(folders, device="cpu")
    wanted = load_model(folders[NAMES[1]]).state_dict()["lm_head.weight"]
    assert torch.equal(from_wire(pool.head(NAMES[1])), wanted)


def test_bfloat16_teachers_travel_without_loss(folders: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(5, 3, generator=generator).bfloat16()
    assert to_wire(tensor).dtype == "uint16"
    assert torch.equal(from_wire(to_wire(tensor)), tensor)
    pool = TeacherPool(folders, dtype="bfloat16", device="cpu")
    hidden = from_wire(pool.score(requests(1))[0])
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), alone(folders, requests(1)[0]), rtol=0.1, atol=0.1)


def test_an_array_that_may_not_be_written_is_read_all_the_same() -> None:
    array = to_wire(torch.arange(4.0))
    array.flags.writeable = False  # what a Ray worker gets
    assert torch.equal(from_wire(array), torch.arange(4.0))


def test_the_least_recently_used_makes_room() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name.upper()

    kept = Recent(make, capacity=2)
    assert [kept(name) for name in "abacab"] == list("ABACAB")
    # c evicts b, since a was used later; b evicts c
    assert made == ["a", "b", "c", "b"]


def test_answers_come_back_in_the_order_of_the_question(folders: dict[str, Path]) -> None:
    role = LocalRole("distill.teachers:TeacherPool", {"teachers": folders, "device": "cpu"})
    teachers = Teachers(role, num_heads=1, timeout_s=1.0)
    asked = [
        Example("d", {r.teacher: 1.0}, r.input_ids, r.positions, r.positions) for r in requests()
    ]
    rows = teachers.ask(asked)()
    assert [row.example for row in rows] == asked
    for row, request in zip(rows, requests(), strict=True):
        wanted = alone(folders, request)
        found = row.teacher_hidden[request.teacher]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_no_more_rows_than_asked_for_are_read_at_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def read(model: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        sizes.append(len(input_ids_BS))
        return hidden_states(model, input_ids_BS, attention_mask_BS)

    monkeypatch.setattr(teachers, "hidden_states", read)
    TeacherPool(folders, rows_per_batch=3, device="cpu").score(requests(8))
    assert sizes == [3, 1, 3, 1]  # four rows of each teacher


def test_a_teacher_that_cannot_be_loaded_is_an_error_of_the_answer(tmp_path: Path) -> None:
    role = LocalRole(
        "distill.teachers:TeacherPool", {"teachers": {"t": tmp_path / "none"}, "device": "cpu"}
    )
    answer = Teachers(role, num_heads=1, timeout_s=1.0).ask(
        [Example("d", {"t": 1.0}, [3], [0], [4])]
    )
    with pytest.raises(Exception, match="none"):
        answer()
