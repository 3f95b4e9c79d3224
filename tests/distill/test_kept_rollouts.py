"""What is kept comes back number for number, until it is let go."""

import math
from pathlib import Path

from distill.kept_rollouts import KeptRollouts
from posttrain.rollout.types import Rollout


def test_rollouts_come_back_number_for_number(tmp_path: Path) -> None:
    logp = [-math.pi, -1e-300, 0.0, -0.1 - 0.2]
    own = [True, True, False, True]
    rollout = Rollout(
        "ä 1", "code", 3, [5, 9], [4, 8, 2, 7], own, logp, 2, "length", "specialist/x"
    )
    kept = KeptRollouts(tmp_path / "rollouts")
    kept.put(7, [rollout, rollout])
    kept.put(8, [])
    again = KeptRollouts(tmp_path / "rollouts")
    assert again.find(7) == [rollout, rollout]
    assert again.find(8) == []
    assert again.find(9) is None


def test_the_journals_of_a_step_end_when_it_is_kept(tmp_path: Path) -> None:
    kept = KeptRollouts(tmp_path)
    assert kept.newest() == -1
    for name in ("1.journal", "12.journal.0", "12.journal.1"):
        (tmp_path / name).touch()
    assert kept.newest() == 12
    kept.put(1, [])
    assert {path.name for path in tmp_path.iterdir()} == {"1.json", "12.journal.0", "12.journal.1"}
    kept.put(12, [])
    assert {path.name for path in tmp_path.iterdir()} == {"1.json", "12.json"}


def test_what_lies_before_a_step_is_let_go(tmp_path: Path) -> None:
    kept = KeptRollouts(tmp_path / "rollouts")
    for step in (9, 10, 11):
        kept.put(step, [])
    kept.drop_before(10)
    assert [kept.find(step) for step in (9, 10, 11)] == [None, [], []]
