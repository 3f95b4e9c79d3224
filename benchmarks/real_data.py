"""GSM8K, HumanEval+ and IFEval end to end: `python benchmarks/real_data.py --data FOLDER`.

Runs the shipped recipes as a user does, in a folder of its own: checks, the look that `posttrain
doctor` takes at the graders, stages, report. Their base has a million parameters and scores 0 or
nearly so: what is shown is that rows, prompts, graders, sandbox and report hold on real data, and
what they cost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import Json, machine, place, write
from public_data import overrides

from posttrain.chat import encode_prompt
from posttrain.domains import Row, rows_to_check
from posttrain.pipeline.checks import check_recipe
from posttrain.pipeline.gold import check_gold
from posttrain.pipeline.recipe_file import RecipeFile, load_recipe
from posttrain.tokenizer import build_tokenizer
from rewards.grader import GradeItem, Grader

RECIPES = {"gsm8k": "GSM8K", "humaneval": "HumanEval+", "ifeval": "IFEval"}
SHOWN = 420
"""Characters of a prompt or an answer that the page has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="The folder with the files that recipes name.")
    parser.add_argument("--page", type=Path, default=Path("docs/real-data.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measured(name, Path(folder) / name, arguments.data) for name in RECIPES]
    data = {**machine("torch", "transformers", "math-verify", "py3langid"), "runs": runs}
    write(arguments.page, data, page)


def measured(name: str, directory: Path, data: Path | None) -> Json:
    changed = overrides(name, data)
    file = load_recipe(name, changed)
    sandboxes = check_recipe(file)
    report = check_gold(file)
    report.raise_problems()
    (facts,) = report.json()
    options = [word for field in changed for word in ("--set", field)]
    command = [sys.executable, "-m", "posttrain", "run", name, "--dir", str(directory), "--plain"]
    start = time.monotonic()
    subprocess.run([*command, *options], check=True)
    seconds = time.monotonic() - start
    domain = file.recipe.domains[name]
    rows = rows_to_check(domain.data, folder=file.folder, seed=file.recipe.seed)
    stages = _stages(directory)
    scored = {
        stage["name"]: json.loads((stage["folder"] / "scores.json").read_text("utf-8"))
        for stage in stages
        if (stage["folder"] / "scores.json").is_file()
    }
    said = [answer for stage in stages for answer in _answers(stage["folder"])]
    return {
        "recipe": name,
        "reward": facts["reward"],
        "num_rows": len(rows),
        "gold": facts,
        "sandbox": sandboxes.get(name),
        "seconds": seconds,
        "stages": [{"name": s["name"], "seconds": s["seconds"]} for s in stages],
        "num_too_long": sum(_num_too_long(stage["folder"]) for stage in stages),
        "prompt": _prompt(rows[0], domain),
        "scores": {stage: found["domains"][name] for stage, found in scored.items()},
        "answer": said[0] if said else None,
        "slowest": _slowest(file, rows, said),
    }


def _stages(directory: Path) -> list[Json]:
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    return [
        {"name": name, "seconds": stage["seconds"], "folder": directory / stage["folder"]}
        for name, stage in manifest["stages"].items()
    ]


def _answers(folder: Path) -> list[Json]:
    """What an evaluation's checkpoint said first to each prompt."""
    path = folder / "samples.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _num_too_long(folder: Path) -> int:
    """Rows that SFT left out for their length."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return sum(int(json.loads(line).get("rows_too_long", 0)) for line in lines)


def _prompt(row: Row, domain: Any) -> Json:
    tokenizer = build_tokenizer()
    ids = encode_prompt(tokenizer, row.messages, tools=domain.prompt_tools, effort=domain.effort)
    return {"num_tokens": len(ids), "text": str(tokenizer.decode(ids))}


def _slowest(file: RecipeFile, rows: Sequence[Row], said: Sequence[Json]) -> Json:
    """The longest that one answer took to grade: every row's gold, or its own prompt where it has
    none, and what the recipe's models said."""
    (domain,) = file.recipe.domains.values()
    by_id = {row.id: row for row in rows}
    texts = [
        ("gold", row, str(row.response[-1]["content"]))
        if row.response
        else ("its own prompt as an answer", row, str(row.messages[-1]["content"]))
        for row in rows
    ]
    texts += [("the model's", by_id[answer["prompt_id"]], answer["raw"]) for answer in said]
    slowest: Json = {"seconds": 0.0}
    total = 0.0
    with Grader(
        domain.graded_rewards, folder=file.folder, timeout_s=domain.reward_timeout_s
    ) as grader:
        for number, (what, row, text) in enumerate([texts[0], *texts]):
            fields = {**domain.reward_fields(row.fields), "messages": row.messages}
            start = time.monotonic()
            grader.score([GradeItem(text, fields)])
            seconds = time.monotonic() - start
            if number:  # the first one starts what the others find
                total += seconds
                if seconds > slowest["seconds"]:
                    slowest = {
                        "seconds": seconds,
                        "what": what,
                        "prompt": _cut(row.messages[-1]["content"], 80),
                    }
        failures = dict(grader.failures)
    mean_ms = 1e3 * total / len(texts)
    return {
        **slowest,
        "num_answers": len(texts),
        "mean_ms": mean_ms,
        "failures": failures,
        "limit_s": domain.reward_timeout_s,
    }


def _cut(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def page(data: Json) -> str:
    lines = [
        "# Real data, end to end",
        "",
        f"{place(data, threads='two threads')}, beside other work (load {data['load']}). Written "
        "by `benchmarks/real_data.py`, which runs the shipped recipes `gsm8k`, `humaneval` and "
        "`ifeval` as `posttrain run` does, on the files that their first lines name. The base is "
        "made from nothing in twenty steps and has a million parameters, so that a score of 0 is "
        "what to expect: shown are rows, prompts, graders, stages and reports. Put a real base in "
        "its place with `base.path`.",
        "",
        "| data | rows | gold that scores 1 | wrong that do | sandbox | slowest answer to grade | "
        "mean | run |",
        "|---|---|---|---|---|---|---|---|",
        *(_summary(run) for run in data["runs"]),
        "",
    ]
    for run in data["runs"]:
        lines += _section(run)
    return "\n".join(lines)


def _summary(run: Json) -> str:
    gold, slowest = run["gold"], run["slowest"]
    right = f"{gold['num_right']} of {gold['num_gold']}" if gold["num_gold"] else "has none"
    return (
        f"| {RECIPES[run['recipe']]} | {run['num_rows']} | {right} | {gold['num_fooled']} of "
        f"{gold['num_wrong']} | {run['sandbox'] or ''} | {1e3 * slowest['seconds']:.0f} ms of "
        f"{slowest['limit_s']:g} s ({slowest['what']}) | {slowest['mean_ms']:.1f} ms | "
        f"{run['seconds']:.0f} s |"
    )


def _section(run: Json) -> list[str]:
    prompt, slowest = run["prompt"], run["slowest"]
    stages = ", ".join(f"{s['name']} {s['seconds']:.1f} s" for s in run["stages"])
    lines = [
        f"## {RECIPES[run['recipe']]}",
        "",
        f"Reward `{run['reward']}`. Stages: {stages}.",
        "",
        f"The first prompt as the model reads it, {prompt['num_tokens']} tokens:",
        "",
        "````",
        _cut(prompt["text"]),
        "````",
        "",
        "| checkpoint | score at T = 1 | 95% interval | prompts | mean tokens | cut at the limit | "
        "not graded |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, scores in run["scores"].items():
        lines.append(
            f"| {name} | {scores['score']:.3f} | {scores['low']:.3f} to {scores['high']:.3f} | "
            f"{scores['n']} | {scores['mean_length']:.1f} | {scores['truncated']:.0%} | "
            f"{sum(scores['failures'].values())} |"
        )
    lines += [
        "",
        f"{run['num_too_long']} demonstrations were too long to be learned. The slowest of "
        f"{slowest['num_answers']} answers to grade was {slowest['what']} to "
        f"`{' '.join(slowest['prompt'].split())}`; "
        f"{sum(slowest['failures'].values())} could not be graded.",
    ]
    if run["answer"]:
        lines += [
            "",
            f"An answer, and why it has {run['answer']['score']:g}: "
            f"{' '.join(run['answer']['reason'].split())}",
            "",
            "````",
            _cut(run["answer"]["raw"], 160),
            "````",
        ]
    return [*lines, ""]


if __name__ == "__main__":
    main()
