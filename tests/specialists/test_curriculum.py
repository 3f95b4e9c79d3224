"""Prompts are chosen by what was measured before, and by nothing else."""

from collections import Counter
from pathlib import Path

from posttrain.domains import Row
from rewards.score import Score
from specialists.config import CurriculumConfig
from specialists.curriculum import Curriculum
from specialists.groups import Group

ROWS = [Row(f"{i:04x}", [{"role": "user", "content": str(i)}]) for i in range(40)]


def measured(path: Path, fresh_share: float, *, step: int = 9) -> Curriculum:
    """Rows 0 to 9 measured in task 0: the even ones had spread."""
    found = Curriculum(path, CurriculumConfig(fresh_share=fresh_share), seed=0)
    if not path.exists():
        found.begin(0)
        for i in range(10):
            found.record(i // 2, 0, ROWS[i], has_spread=i % 2 == 0)
    else:
        found.begin(step)
    return found


def test_a_share_is_fresh_and_the_others_had_different_rewards(tmp_path: Path) -> None:
    curriculum = measured(tmp_path / "visits.jsonl", 0.3)
    chosen = [curriculum.choose(v, 0, ROWS[v % 40], ROWS).id for v in range(1000)]
    known = {ROWS[i].id for i in range(0, 10, 2)}
    never_again = {ROWS[i].id for i in range(1, 10, 2)}  # always or never solved
    again = sum(name in known for name in chosen)
    assert 0.65 < again / 1000 < 0.75
    assert not set(chosen) & never_again
    assert set(chosen) >= known
    due = [(v, name) for v, name in enumerate(chosen) if v % 40 >= 10 and name not in known]
    fresh = [name for _, name in due]
    assert fresh == [
        ROWS[v % 40].id for v, _ in due
    ]  # a prompt that is due and fresh is not passed over
    assert max(Counter(chosen[v] for v in range(0, 1000, 40)).values()) < 15


def test_a_group_without_spread_never_makes_room_for_a_prompt_that_is_known_to_have_none(
    tmp_path: Path,
) -> None:
    curriculum = measured(tmp_path / "visits.jsonl", 0.3)
    useless = [ROWS[i] for i in range(1, 10, 2)]
    teaching = [row for row in ROWS if row not in useless]  # fresh ones too
    assert curriculum.teaching(0, ROWS) == teaching
    assert curriculum.teaching(1, ROWS) == ROWS
    assert curriculum.teaching(0, useless[:2]) == useless[:2]


def test_one_tasks_measures_say_nothing_of_anothers(tmp_path: Path) -> None:
    curriculum = measured(tmp_path / "visits.jsonl", 0.0)
    assert [curriculum.choose(v, 1, ROWS[v], ROWS) for v in range(40)] == ROWS


def test_where_nothing_is_fresh_all_visits_are_to_prompts_that_teach(tmp_path: Path) -> None:
    curriculum = measured(tmp_path / "visits.jsonl", 0.5)
    chosen = {curriculum.choose(v, 0, ROWS[v % 10], ROWS[:10]).id for v in range(300)}
    assert chosen == {ROWS[i].id for i in range(0, 10, 2)}


def test_where_nothing_is_fresh_or_useful_the_plan_holds(tmp_path: Path) -> None:
    curriculum = Curriculum(tmp_path / "v.jsonl", CurriculumConfig(fresh_share=0.5), seed=0)
    curriculum.begin(0)
    for row in ROWS:
        curriculum.record(0, 0, row, has_spread=False)
    assert [curriculum.choose(v, 0, ROWS[v], ROWS) for v in range(40)] == ROWS


def test_a_resumed_run_chooses_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    path = tmp_path / "visits.jsonl"
    before = measured(path, 0.4)
    wanted = [before.choose(v, 0, ROWS[v % 40], ROWS) for v in range(200)]
    before.record(7, 0, ROWS[20], has_spread=True)  # of the step that the kill undid
    with path.open("a") as file:
        file.write('{"step": 7, "ta')
    after = measured(path, 0.4, step=7)
    assert [after.choose(v, 0, ROWS[v % 40], ROWS) for v in range(200)] == wanted
    assert [line for line in path.read_text().splitlines() if '"step": 7' in line] == []


def test_what_length_costs_makes_no_solved_prompt_worth_another_visit() -> None:
    solved, known = [Score(1.0, ""), Score(1.0, "")], [Score(1.0, ""), Score(0.0, "")]
    unjudged = Score(float("nan"), "")
    assert Group([], solved, [0.1, 0.3]).spread > 0
    assert len(Group([], [*solved, unjudged], [0.1, 0.3, 0.0]).judged) == 1
    assert len(Group([], known, [0.0, 0.0]).judged) == 2
