"""What the graders cost and withstand: `python benchmarks/graders.py`.

For each grader, through `rewards.grader.Grader` as in training: gold answers and wrong ones of the
shipped recipes (`posttrain doctor`), of puzzles and of forms; hostile answers (`grader_attacks.py`)
with the longest time one took, and what bounds it; the answers a second of one process. Then the
sandbox alone: programs a second by one server and by two side by side, at every level that this
machine reaches.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import grader_attacks as attacks
from measured import Json, machine, place, write
from public_data import overrides

from posttrain.domains import DomainSpec
from posttrain.generated.mathematics import problems
from posttrain.pipeline.gold import check_gold
from posttrain.pipeline.recipe_file import load_recipe
from rewards import verifier
from rewards.environments import MAX_CALLS
from rewards.environments.database import MAX_STEPS_IN_ALL
from rewards.grader import GradeItem, Grader
from rewards.instructions import CHECKS
from rewards.programs import score as score_program
from rewards.sandbox import LEVELS, Limits, Sandbox

RECIPES = ("quickstart", "environment", "gsm8k", "humaneval", "ifeval")
PUZZLES = {
    **{"basic_arithmetic": {}, "chain_sum": {}, "gcd": {}, "leg_counting": {}},
    **{"letter_counting": {}, "number_filtering": {}, "simple_equations": {}},
    **{"spell_backward": {}, "needle_haystack": {"max_num_statements": 40}},
}
"""Tasks of reasoning-gym, each with settings of its own."""
NUM_PUZZLES = 500
NUM_FORMS = 500
FORM = {
    **{"thinks": True, "max_thinking_words": 30, "min_words": 1, "max_words": 10},
    "max_repetition": 0.2,
}
REWARD_TIMEOUT_S: float = DomainSpec.model_fields["reward_timeout_s"].default
NUM_ANSWERS = 2_000
NUM_PROGRAMS = 300
DATABASE = {"kind": "database", "start": "CREATE TABLE t (n INT); INSERT INTO t VALUES (1)"}
INSERT = {"name": "sql", "arguments": {"statement": "INSERT INTO t VALUES (2)"}}

Rows = list[tuple[str, GradeItem]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="The folder with the files that recipes name.")
    parser.add_argument("--page", type=Path, default=Path("docs/graders.md"))
    arguments = parser.parse_args()
    data: Json = {
        **machine("math-verify", "py3langid"),
        "gold": [
            *(fact for name in RECIPES for fact in gold(name, overrides(name, arguments.data))),
            *puzzles(),
            forms(),
        ],
        "bounds": bounds(),
        "hung": hung(),
        "attacks": [attacked(name, items) for name, items in hostile().items()],
        "speed": [speed(*case) for case in typical()],
        "sandbox": [sandbox(level) for level in reversed(LEVELS)],
        "num_instructions": len(CHECKS),
    }
    write(arguments.page, data, page)


def gold(name: str, changed: Sequence[str] = ()) -> list[Json]:
    """The recipe's self-check; nothing where its data is not here."""
    file = load_recipe(name, changed)
    paths = [file.folder / d.data.jsonl for d in file.recipe.domains.values() if d.data.jsonl]
    if not all(path.exists() for path in paths):
        return []
    report = check_gold(file)
    report.raise_problems()
    return [{**fact, "recipe": name} for fact in report.json()]


def puzzles() -> list[Json]:
    """The same of reasoning-gym's tasks, by a recipe for them."""
    domains: Json = {
        task: {
            "data": {"reasoning_gym": {"task": task, "size": NUM_PUZZLES, **settings}},
            "reward": "puzzles",
            "grpo": {},
        }
        for task, settings in PUZZLES.items()
    }
    base: Json = {"path": "base"}  # which nobody opens
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "puzzles.yaml"
        path.write_text(json.dumps({"name": "puzzles", "base": base, "domains": domains}))
        return [{**fact, "recipe": "reasoning-gym"} for fact in gold(str(path))]


def forms() -> Json:
    """Demonstrations that think in short and answer, and what has another form."""
    turns = [row["demonstration"][0] for row in problems(size=NUM_FORMS, seed=0)]
    right = [(turn["reasoning"], turn["content"]) for turn in turns]
    spoilt: dict[str, Callable[[str, str], tuple[str, str]]] = {
        "silence": lambda thought, answer: (thought, ""),
        "no thought": lambda thought, answer: ("", answer),
        "a long thought": lambda thought, answer: (" ".join(map(str, range(40))), answer),
        "a long answer": lambda thought, answer: (thought, " ".join(map(str, range(40)))),
        "going round in circles": lambda thought, answer: (f"{thought} so {answer} " * 9, answer),
        "a second thought": lambda thought, answer: (thought, f"<think>{thought}</think>{answer}"),
        "an open tag": lambda thought, answer: (thought, f"{answer}<think>"),
    }
    wrong = [spoil(*pair) for spoil in spoilt.values() for pair in right]
    start = time.monotonic()
    with Grader({"formats": 1.0}) as grader:
        scores = grader.score([_formed(*pair) for pair in [*right, *wrong]])
    return {
        "recipe": "generated",
        "domain": "mathematics",
        "reward": "formats",
        "num_rows": NUM_FORMS,
        "num_gold": len(right),
        "num_right": sum(score.reward == 1.0 for score in scores[: len(right)]),
        "num_wrong": len(wrong),
        "num_fooled": sum(score.reward >= 1.0 for score in scores[len(right) :]),
        "best_constant": None,
        "wrong": list(spoilt),
        "seconds": time.monotonic() - start,
    }


def _formed(thought: str, answer: str) -> GradeItem:
    turn = {"role": "assistant", "reasoning": thought, "content": answer}
    return GradeItem(answer, {**FORM, "messages": [turn]})


def hostile() -> dict[str, Rows]:
    """Each grader's attacks, by name, as items to be graded."""
    forms = {"thinks": True, "max_repetition": 0.5, "language": "en", "min_words": 1}
    told: Json = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    return {
        "mathematics": _items(attacks.MATHEMATICS, {"answer": "x^2+2x+1"}),
        "programs": _items(attacks.PROGRAMS, {"tests": attacks.SQUARES, "timeout_s": 1.0}),
        "instructions": _items(attacks.TEXTS, told),
        "tools": [
            (name, GradeItem("done", _tool_row(call))) for name, call in attacks.TOOL_CALLS.items()
        ],
        "puzzles": _items({**attacks.TEXTS, "twice": "42 42", "nan": "nan"}, {"answer": "42"}),
        "formats": _items(attacks.TEXTS, forms),
    }


def _items(responses: Mapping[str, str], row: Json) -> Rows:
    return [(name, GradeItem(text, row)) for name, text in responses.items()]


def _tool_row(call: Json) -> Json:
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"environment": DATABASE, "solution": [INSERT], "messages": [turn]}


def attacked(reward: str, items: Rows) -> Json:
    """How many attacks score, and the longest that one took."""
    seconds: dict[str, float] = {}
    scored: list[str] = []
    with Grader({reward: 1.0}, timeout_s=10.0) as grader:
        grader.score([items[-1][1]])  # what it starts by itself is there
        for name, item in items:
            start = time.monotonic()
            (score,) = grader.score([item])
            seconds[name] = time.monotonic() - start
            scored += [name] if score.reward > 0 else []
        failures = dict(grader.failures)
    slowest = max(seconds, key=lambda name: seconds[name])
    return {
        "reward": reward,
        "attacks": len(items),
        "scored": scored,
        "failures": failures,
        "slowest": slowest,
        "slowest_s": seconds[slowest],
    }


def bounds() -> dict[str, str]:
    """What ends each grader by itself; the others take time in proportion to an answer's length."""
    program = signature(score_program).parameters["timeout_s"].default
    return {
        "mathematics": f"{verifier.PROCESSOR_S:g} s of processor time a question, "
        f"{verifier.TIMEOUT_S:g} s in all",
        "programs": f"`timeout_s` ({program:g} s) for all of a row's tests",
        "tools": f"{MAX_CALLS} calls, {MAX_STEPS_IN_ALL:,} steps of SQLite",
    }


def hung() -> Json:
    """How long the grader takes to end a reward that never does, and to have a score of it."""
    source = "import time\ndef reward(response, **row):\n    time.sleep(1e6)\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "never_ends.py").write_text(source)
        with Grader({"never_ends:reward": 1.0}, folder=Path(folder), timeout_s=1.0) as grader:
            start = time.monotonic()
            grader.score([GradeItem("")])
            return {"timeout_s": 1.0, "seconds": time.monotonic() - start}


def typical() -> list[tuple[str, str, GradeItem, int]]:
    """A reward, what is measured, one answer of the kind, and how many of it."""
    program = {"tests": attacks.SQUARES}
    told: Json = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 300, "relation": "at least"}],
    }
    sentence = "The weather is fine today and we go out. " * 40
    number = GradeItem("So the answer is 85.", {"answer": "85"})
    latex = GradeItem("\\boxed{(x+1)^2}", {"answer": "x^2+2x+1"})
    return [
        ("mathematics", "numbers", number, NUM_ANSWERS),
        ("mathematics", "LaTeX, by math-verify", latex, NUM_ANSWERS // 4),
        ("programs", "3 calls, sandboxed", GradeItem("def f(x): return x * x", program), 300),
        ("instructions", "2 instructions, 360 words", GradeItem(sentence, told), NUM_ANSWERS),
        ("tools", "a database, 1 call", GradeItem("done", _tool_row(INSERT)), NUM_ANSWERS // 4),
        ("puzzles", "a word", GradeItem("42", {"answer": "42"}), NUM_ANSWERS),
        ("formats", "360 words", GradeItem(sentence, {"max_repetition": 1.0}), NUM_ANSWERS),
    ]


def speed(reward: str, what: str, item: GradeItem, number: int) -> Json:
    with Grader({reward: 1.0}) as grader:
        (score,) = grader.score([item])
        if score.reward != 1.0:
            raise SystemExit(f"{reward}, {what}: {score.reason}")
        start = time.monotonic()
        grader.score([item] * number)
        seconds = time.monotonic() - start
    return {"reward": reward, "what": what, "answers_per_s": number / seconds}


def sandbox(level: Any) -> Json:
    """Programs a second by one server and by two, and the processor time that one program takes,
    in all of the sandbox's processes."""
    rates: dict[int, float] = {}
    cpu_ms = 0.0
    for servers in (1, 2):
        before = os.times()
        boxes = [Sandbox(lowest="limits", highest=level) for _ in range(servers)]
        reached = boxes[0].level
        with ThreadPoolExecutor(servers) as pool:
            start = time.monotonic()
            list(pool.map(run_programs, boxes))
            rates[servers] = servers * NUM_PROGRAMS / (time.monotonic() - start)
        for box in boxes:
            box.close()  # waited for, its processes' time is counted as our children's
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        cpu_ms = 1e3 * used / (servers * NUM_PROGRAMS)
        if reached != level:
            return {"level": level, "is_reached": False}
    return {"level": level, "is_reached": True, "one": rates[1], "two": rates[2], "cpu_ms": cpu_ms}


def run_programs(box: Sandbox) -> None:
    for number in range(NUM_PROGRAMS):
        run = box.run("def f(x): return x + 1", calls=[f"f({number})"], limits=Limits())
        if [result.text for result in run.results] != [str(number + 1)]:
            raise SystemExit(f"a program gave {run}")


def page(data: Json) -> str:
    return "\n".join(
        [
            "# Graders, measured",
            "",
            f"{place(data, threads='two threads')}, beside the machine's other work (load "
            f"{data['load']}). Written by `benchmarks/graders.py`, which says how. `instructions` "
            f"knows {data['num_instructions']} instructions.",
            "",
            *_attack_lines(data),
            "Whatever a grader does, an answer has its score when the recipe's `reward_timeout_s` "
            f"({REWARD_TIMEOUT_S:g} s) is over: the process is ended then. With "
            f"{data['hung']['timeout_s']:g} s, a reward that never returns took "
            f"{data['hung']['seconds']:.2f} s. Where a grader has no bound of its own, what its "
            "slowest attack took is all that is known.",
            "",
            "A wrong answer is silence, ignorance, or another row's gold, which may be right after "
            "all: of `quickstart`'s programs some do the same. IFEval's rows have no gold. Of "
            f"`formats` it is a demonstration spoilt: {', '.join(data['gold'][-1]['wrong'])}.",
            "",
            *_gold_lines(data),
            *_sandbox_lines(data),
        ]
    )


def _attack_lines(data: Json) -> list[str]:
    lines = [
        "| grader | attacks | that score | the slowest | seconds | its own time bound | answers a "
        "second |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["attacks"]:
        rates = [
            f"{case['answers_per_s']:,.0f} ({case['what']})"
            for case in data["speed"]
            if case["reward"] == row["reward"]
        ]
        lines.append(
            f"| {row['reward']} | {row['attacks']} | {len(row['scored'])} | {row['slowest']} | "
            f"{row['slowest_s']:.2f} | {data['bounds'].get(row['reward'], '')} | "
            f"{', '.join(rates)} |"
        )
    return [*lines, ""]


def _gold_lines(data: Json) -> list[str]:
    lines = [
        "| data | domain | grader | rows | gold that scores 1 | wrong that do | a constant |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["gold"]:
        constant = row["best_constant"]
        lines.append(
            f"| {row['recipe']} | {row['domain']} | {row['reward']} | {row['num_rows']} | "
            f"{row['num_right']} of {row['num_gold']} | {row['num_fooled']} of {row['num_wrong']} "
            f"| {'' if constant is None else f'{constant:.3f}'} |"
        )
    return [*lines, ""]


def _sandbox_lines(data: Json) -> list[str]:
    lines = [
        "Programs a second, each in a process of its own; processor time is that of all the "
        "sandbox's processes, start included:",
        "",
        "| sandbox level | one server | two servers | processor ms a program |",
        "|---|---|---|---|",
    ]
    for row in data["sandbox"]:
        if not row["is_reached"]:
            lines.append(f"| {row['level']} | not reached | | |")
            continue
        rates = f"{row['one']:.0f} | {row['two']:.0f} | {row['cpu_ms']:.1f}"
        lines.append(f"| {row['level']} | {rates} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
