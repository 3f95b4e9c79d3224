"""Ranks that share out the vocabulary, unevenly, get what one rank gets."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RANK = Path(__file__).with_name("reverse_kl_rank.py")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(num_ranks: int, out: Path) -> list[dict[str, Any]]:
    """What each rank saved."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_ranks),
        "PYTHONPATH": str(RANK.parents[2]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::FutureWarning", RANK, out],
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(num_ranks)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * num_ranks
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(out / f"{rank}.pt") for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank's."""
    return run(1, tmp_path_factory.mktemp("one"))[0]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("torch.float64", 1e-12),
        ("torch.float32", 1e-6),
        ("first teacher", 1e-12),
        ("frozen head", 1e-12),
        ("no tokens", 0.0),
    ],
)
def test_ranks_get_what_one_gets(
    case: str, tolerance: float, ranks: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    wanted = one[case]
    for name, value in wanted.items():
        if name in ("head", "bias"):  # each rank has its part's
            found = [torch.cat([rank[case][name] for rank in ranks])]
        else:
            found = [rank[case][name] for rank in ranks]
        for x in found:
            atol = tolerance * float(value.abs().max() if value.numel() else 0)
            torch.testing.assert_close(x, value, rtol=tolerance, atol=atol)
        assert all(torch.equal(x, found[0]) for x in found)


def test_tokens_gathered_over_the_ranks_get_what_they_would_together(
    ranks: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    for name, value in one["gathered"].items():
        found = torch.cat([rank["gathered"][name] for rank in ranks])
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14)


def test_every_rank_says_what_is_wrong_and_none_waits(ranks: list[dict[str, Any]]) -> None:
    for i, rank in enumerate(ranks):
        not_finite, uneven = rank["errors"]
        assert "reverse KL of row 0 to teacher 1 is nan" in not_finite
        assert ("teacher 1's head" in not_finite) == (i == len(ranks) - 1)
        assert "the ranks of the group have [12, 13" in uneven
