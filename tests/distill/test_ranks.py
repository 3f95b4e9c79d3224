"""Several learner ranks take the steps that one rank takes."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from small_steps import OPTIMIZERS

from distill.batch import Example, ScoredExample
from distill.config import LearnersConfig
from distill.mesh import Strategy
from distill.ranks import deal

RANK = Path(__file__).with_name("rank.py")


def learn(num_ranks: int, strategy: str, out: Path) -> dict[str, Any]:
    """What rank 0 of `num_ranks` processes found."""
    out.mkdir(parents=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, out, str(rank), str(num_ranks), *strategy.split("/")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANK.parents[2])},
        )
        for rank in range(num_ranks)
    ]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0] * num_ranks
    finally:
        for rank in ranks:
            rank.kill()
    return torch.load(out / "found.pt")


STRATEGIES = get_args(Strategy)
WAYS = (*STRATEGIES, "ddp/vocab", "fsdp2/vocab")
"""A strategy, and whether ranks share out the vocabulary."""
# Adam divides what rounding leaves of a gradient of nearly 0 by its size, to 3% of a step of 1e-3
WEIGHTS_ATOL = {"adamw": 5e-5, "muon": 2e-5}


def optimizers(way: str) -> tuple[str, ...]:
    return next(found for name, found in OPTIMIZERS.items() if name == way.partition("/")[0])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], dict[str, Any]]:
    """`learn`, once for each number of ranks and strategy."""
    folder = tmp_path_factory.mktemp("ranks")
    return cache(
        lambda num_ranks, strategy: learn(num_ranks, strategy, folder / f"{num_ranks}{strategy}")
    )


def test_the_strategies_of_a_recipe_are_the_meshs() -> None:
    assert get_args(LearnersConfig.model_fields["strategy"].annotation) == STRATEGIES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "way"), [*((2, way) for way in WAYS), (3, "ddp/vocab"), (3, "fsdp2/vocab")]
)
def test_ranks_take_the_steps_of_one(
    num_ranks: int, way: str, found: Callable[[int, str], dict[str, Any]]
) -> None:
    one, two = found(1, "ddp"), found(num_ranks, way)
    whats = [what for what in one if what.startswith(("uneven", "lopsided"))]
    assert len(whats) == 5
    for rows in whats:  # four rows and one; none and five
        wanted, ours = one[rows]["metrics"], two[rows]["metrics"]
        assert ours.keys() == wanted.keys()
        torch.testing.assert_close(ours["loss"], wanted["loss"], rtol=1e-6, atol=0)
        for name, value in wanted.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)
        for name, gradient in one[rows]["gradients"].items():
            ours = two[rows]["gradients"][name]
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=2e-6)
    for optimizer in optimizers(way):
        for name, weight in one[optimizer]["before"]["model"].items():
            ours = two[optimizer]["before"]["model"][name]
            torch.testing.assert_close(ours, weight, rtol=1e-4, atol=WEIGHTS_ATOL[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_one_rank_spoils_changes_nothing_on_any(
    way: str, found: Callable[[int, str], dict[str, Any]]
) -> None:
    for optimizer in optimizers(way):
        training = found(2, way)[optimizer]
        before, after = training["before"], training["skipped"]
        assert after["guard"]["num_skipped"] == 1
        assert_same_bits(after["model"], before["model"])
        assert_same_bits(after["optimizer"]["state"], before["optimizer"]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_parameters_that_nothing_reaches_are_refused_where_they_would_decay(
    strategy: Strategy, found: Callable[[int, str], dict[str, Any]]
) -> None:
    message = found(2, strategy)["unreached"]
    assert "no gradient reaches model.mtp.0" in message
    assert "set distill.learners.strategy to ddp or fsdp2" in message


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ranks_go_on_from_a_saved_state_to_the_same_bits(
    way: str, found: Callable[[int, str], dict[str, Any]]
) -> None:
    for optimizer in optimizers(way):
        training = found(2, way)[optimizer]
        assert_same_bits(training["resumed"], training["straight"])


def assert_same_bits(found: Any, wanted: Any) -> None:
    """Of a state of tensors at any depth."""
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
        return
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(found[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3", "fsdp2/vocab"])
def test_a_saved_state_is_the_one_of_a_student_in_one_piece(
    strategy: str, found: Callable[[int, str], dict[str, Any]]
) -> None:
    wanted, ours = (found(*key)["adamw"]["before"] for key in ((1, "ddp"), (2, strategy)))
    assert ours["model"].keys() == wanted["model"].keys()
    groups = ours["optimizer"]["param_groups"]
    assert groups == wanted["optimizer"]["param_groups"]
    assert ours["optimizer"]["state"].keys() == wanted["optimizer"]["state"].keys()
    for i, state in wanted["optimizer"]["state"].items():
        for key, value in state.items():
            found_value = ours["optimizer"]["state"][i][key]
            torch.testing.assert_close(found_value, value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's loopback")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_of_one_machine_listen_on_loopback_alone(
    strategy: Strategy, found: Callable[[int, str], dict[str, Any]]
) -> None:
    assert found(2, strategy)["listens at"] == {"127.0.0.1"}


def test_every_row_is_dealt_to_one_rank() -> None:
    examples = [
        Example("d", {f"t{i % 2}": 1.0}, [i] * (i + 1), [i], [i], [0.0]) for i in reversed(range(7))
    ]
    rows = [ScoredExample(example, {}) for example in examples]
    for num_ranks in (1, 3, 9):
        parts = deal(rows, num_ranks)
        assert sorted(r.example.sampled[0] for part in parts for r in part) == list(range(7))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
