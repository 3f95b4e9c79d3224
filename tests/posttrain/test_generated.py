"""Generated data: clean demonstrations score 1, bad habits score 0, by the real rewards."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from posttrain.generated import agent, code, instructions, mathematics, store
from rewards import Score, load_reward

MADE_UP = re.compile(r"\.(rev|tail|head|even|odd|up|low|cap|swap)\(\)")


@dataclass(frozen=True)
class Domain:
    module: Any
    reward: str
    num_prompts: int | None
    """Prompts there are; None: more than anyone draws."""


DOMAINS = {
    "mathematics": Domain(mathematics, "mathematics", 90 * 90),
    "code": Domain(code, "programs", 10 + 100 + 1000),
    "agent": Domain(agent, "tools", None),
    "instructions": Domain(instructions, "instructions", None),
    "store": Domain(store, "tools", None),
}


@pytest.fixture(params=DOMAINS)
def domain(request: pytest.FixtureRequest) -> Domain:
    return DOMAINS[request.param]


def graded(domain: Domain, row: dict[str, Any]) -> Score:
    fields = {k: v for k, v in row.items() if k not in ("prompt", "demonstration", "is_right")}
    messages = [{"role": "user", "content": row["prompt"]}, *row["demonstration"]]
    score = load_reward(domain.reward)(messages[-1]["content"], messages=messages, **fields)
    assert isinstance(score, Score)
    return score


def test_every_clean_demonstration_scores_one(domain: Domain) -> None:
    for row in domain.module.problems(size=200, seed=1):
        assert graded(domain, row).reward == 1.0, row


def test_web_rows_are_right_or_really_wrong(domain: Domain) -> None:
    for row in domain.module.web(size=300, seed=2):
        assert graded(domain, row).reward == float(row["is_right"]), row


@pytest.mark.parametrize("quality", [0.0, 0.4, 1.0])
def test_quality_is_the_share_of_right_rows(domain: Domain, quality: float) -> None:
    right = [row["is_right"] for row in domain.module.web(size=2000, seed=3, quality=quality)]
    # six standard deviations of a binomial share with n = 2000
    assert abs(sum(right) / 2000 - quality) <= 6 * (quality * (1 - quality) / 2000) ** 0.5


@pytest.mark.parametrize("stream", ["problems", "web"])
def test_a_stream_is_its_seed(domain: Domain, stream: str) -> None:
    make: Callable[..., Any] = getattr(domain.module, stream)
    rows = list(make(size=50, seed=5))
    assert rows == list(make(size=50, seed=5))
    assert rows == json.loads(json.dumps(rows))
    assert rows != list(make(size=50, seed=6))
    assert rows[:20] == list(itertools.islice(make(size=1000, seed=5), 20))


def test_problems_are_distinct_and_end_with_the_prompts(domain: Domain) -> None:
    prompts = [row["prompt"] for row in domain.module.problems(size=9000, seed=7)]
    assert len(prompts) == len(set(prompts))
    if domain.num_prompts is None:
        assert len(prompts) == 9000
    else:
        assert 0.98 * domain.num_prompts <= len(prompts) <= domain.num_prompts


def test_a_sum_by_hand() -> None:
    rows = {row["prompt"]: row for row in mathematics.problems(size=9000, seed=0)}
    for prompt, working, answer in [
        ("38+47=", "8+7=15;3+4+1=8", "85"),
        ("23+14=", "3+4=7;2+1=3", "37"),
        ("88+79=", "8+9=17;8+7+1=16", "167"),
        ("60+40=", "0+0=0;6+4=10", "100"),
    ]:
        row = rows[prompt]
        assert row["answer"] == answer
        assert row["demonstration"] == [
            {"role": "assistant", "reasoning": working, "content": answer}
        ]


def test_a_program_by_hand() -> None:
    rows = {row["prompt"]: row for row in code.problems(size=2000, seed=0)}
    row = rows["rev|up|tail"]
    assert row["demonstration"][0]["content"] == "x[::-1].upper()[1:]"
    assert code.run(("rev", "up", "tail"), "abC") == "BA"
    assert code.run(("strip", "cap", "odd"), " aBcd ") == "bd"


def test_hidden_inputs_tell_all_near_misses_apart() -> None:
    parts = ["aB", " ", "c", "D ", "9", " x"]
    probes = ["".join(p) for n in range(5) for p in itertools.product(parts, repeat=n)]
    for row in itertools.islice(code.problems(size=2000, seed=4), 250):
        operations = tuple(row["prompt"].split("|"))
        inputs = [test["x"] for test in row["tests"]]
        assert len(inputs) >= 5
        assert "" in inputs
        assert any(len(x) == 1 for x in inputs)
        wanted = {x: code.run(operations, x) for x in [*inputs, *probes]}
        for near in code.near_misses(operations):
            if all(code.run(near, x) == wanted[x] for x in inputs):
                assert all(code.run(near, x) == wanted[x] for x in probes), (row["prompt"], near)


def test_the_tool_knows_the_rows_table_only() -> None:
    row = next(agent.problems(size=1, seed=0))
    key = row["call"]["arguments"]["key"]
    assert agent.get("get", {"key": key}, **row) == row["answer"]
    assert agent.get("get", {"key": "?"}, **row) == "none"
    assert agent.get("get", {}, **row) == "none"
    assert len(row["table"]) == 4


@pytest.mark.parametrize(
    ("domain_name", "habit"),
    [
        ("mathematics", lambda row: row["demonstration"][0]["content"].startswith(row["answer"])),
        (
            "mathematics",
            lambda row: not row["demonstration"][0]["content"].startswith(row["answer"]),
        ),
        ("code", lambda row: MADE_UP.search(row["demonstration"][0]["content"])),
        ("agent", lambda row: "tool_calls" not in row["demonstration"][0]),
        ("agent", lambda row: row["demonstration"][1:2] == [{"role": "tool", "content": "none"}]),
        (
            "agent",
            lambda row: row["demonstration"][1:2] == [{"role": "tool", "content": row["answer"]}],
        ),
        ("store", lambda row: len(row["demonstration"]) == 4),
        ("store", lambda row: row["demonstration"][1]["content"] == "set"),
        (
            "store",
            lambda row: (
                len(row["demonstration"]) == 6
                and row["demonstration"][2]["tool_calls"][0]["arguments"]["value"]
                != row["demonstration"][1]["content"]
            ),
        ),
        ("instructions", lambda row: row["demonstration"][0]["content"][-1].isalpha()),
        (
            "instructions",
            lambda row: row["kwargs"][0]["separator"] not in row["demonstration"][0]["content"],
        ),
    ],
)
def test_every_habit_is_common(domain_name: str, habit: Callable[[dict[str, Any]], object]) -> None:
    rows = [
        row for row in DOMAINS[domain_name].module.web(size=1000, seed=9) if not row["is_right"]
    ]
    assert sum(bool(habit(row)) for row in rows) > 0.04 * len(rows)
