"""What GRPO alone adds to a specialist: `python benchmarks/grpo_curves.py RUN`.

RUN is a finished run's folder. Each domain's GRPO starts from the run's SFT checkpoint, the same
for all seeds, and is trained anew with the recipe's settings; seeds decide the prompts' order and
what is sampled. Before and after, held-out prompts are answered four times each at T = 1. Each
training is a process of its own, one thread. Beside the page stands its plot, an SVG of the same
name.
"""

import argparse
import json
import sys
import tempfile
from contextlib import closing
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from charts import chart
from grpo import PEERS, measure, scored, stage_of
from measured import Json, apart, machine, place, write

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.pipeline.recipe import Recipe
from posttrain.report_plots import Series
from posttrain.tasks import Task

PART = 5
"""Steps whose rewards make a mean of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--page", type=Path, default=Path("docs/grpo-curves.md"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of each; the recipe's by default")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        domain, seed, out = arguments.worker
        found = trained(arguments.run, domain, int(seed), Path(out), arguments.steps)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    recipe = Recipe.model_validate(
        yaml.safe_load((arguments.run / "recipe.yaml").read_text("utf-8"))
    )
    domains = [name for name, found in recipe.specialists().items() if found.grpo is not None]
    data: Json = {**machine("torch", "transformers", "trl"), "recipe": recipe.name, "rows": []}
    for domain, seed in product(domains, range(arguments.seeds)):
        sys.stderr.write(f"{domain}, seed {seed} ...\n")
        with tempfile.TemporaryDirectory() as out:
            data["rows"].append(apart("--worker", domain, str(seed), out))
        write(arguments.page, data, page)
        arguments.page.with_suffix(".svg").write_text(picture(data), encoding="utf-8")


def trained(run: Path, domain: str, seed: int, out: Path, num_steps: int | None) -> Json:
    """A row of the table."""
    config, start = stage_of(run, domain, num_steps)
    (spec,) = config.domains
    with closing(Task(spec, load_tokenizer(start), folder=run, seed=0)) as task:
        before = scored(load_model(start), task, spec)
    found = measure(PEERS[0], config, start, out, run, seed=seed)
    kept: Any = {key: found[key] for key in ("seed", "steps", "rows", "rewards")}
    return {"domain": domain, **kept, "before": before, "after": found["score"]}


def picture(data: Json) -> str:
    names = list(dict.fromkeys(row["domain"] for row in data["rows"]))
    lines = [
        Series(
            row["domain"],
            [float(step) for step in range(1, len(row["rewards"]) + 1)],
            row["rewards"],
            names.index(row["domain"]) % 7 + 1,
        )
        for row in data["rows"]
    ]
    return chart(lines, unit="reward", along="step")


def page(data: Json) -> str:
    """docs/grpo-curves.md."""
    longest = max(len(row["rewards"]) for row in data["rows"])
    heads = [f"{first + 1}-{min(first + PART, longest)}" for first in range(0, longest, PART)]
    lines = [
        "# What GRPO alone adds",
        "",
        f"Written by `benchmarks/grpo_curves.py`; {place(data)}.",
        f"The {data['recipe']}'s domains, each from one SFT checkpoint, trained by GRPO with",
        "several seeds; nothing else is trained.",
        "",
        "![reward over steps](grpo-curves.svg)",
        "",
        "The plot's lines are running means over five steps.",
        "",
        "Mean score of held-out prompts, four answers each at T = 1, with its 95% interval over",
        "prompts:",
        "",
        "| | seed | after SFT | after GRPO | more |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        (mean, low, high), (then, least, most) = row["before"], row["after"]
        lines.append(
            f"| {row['domain']} | {row['seed']} | {mean:.3f} [{low:.3f}, {high:.3f}] | "
            f"{then:.3f} [{least:.3f}, {most:.3f}] | {then - mean:+.3f} |"
        )
    lines += [
        "",
        "Mean reward of the answers that were trained on, by steps:",
        "",
        f"| | seed | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for row in data["rows"]:
        rewards = row["rewards"]
        parts = [fmean(rewards[i : i + PART]) for i in range(0, len(rewards), PART)]
        cells = " | ".join(f"{part:.2f}" for part in parts)
        lines.append(f"| {row['domain']} | {row['seed']} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
