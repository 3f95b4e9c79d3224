"""What the whole vocabulary is worth: `python benchmarks/granularity.py PAGE RUN [RUN ...]`.

Each RUN is the directory of a finished `posttrain run granularity`, one a seed. Every number comes
from the runs' report.json. Beside the page stands its plot, an SVG of the same name: the score on
held-out prompts over tokens that carried loss, the mean over the runs.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from charts import chart

from posttrain.report_plots import Series

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the markdown file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, each with report.json")
    arguments = parser.parse_args()
    reports = [json.loads((run / "report.json").read_text("utf-8")) for run in arguments.runs]
    plot = arguments.page.with_suffix(".svg")
    plot.write_text(picture(reports), encoding="utf-8")
    arguments.page.write_text(page(reports, plot.name), encoding="utf-8")


def ways(reports: Sequence[Json]) -> list[str]:
    """`opd` and its ablations, as the recipe gives them."""
    return list(reports[0]["progress"])


def name_of(way: str) -> str:
    return "reverse KL, whole vocabulary" if way == "opd" else way.removeprefix("opd/")


def page(reports: Sequence[Json], plot: str) -> str:
    count = len(reports)
    versions = ", ".join(f"{k} {v}" for k, v in reports[0]["versions"].items())
    seeds = " | ".join(f"score {i}" for i in range(count))
    gaps = " | ".join(f"behind OPD {i}" for i in range(count))
    lines = [
        "# What the whole vocabulary is worth",
        "",
        f"`posttrain run granularity`, {count} seeds: the quickstart's base and specialists, "
        "distilled in several ways by as many steps on the same prompts. Written by "
        f"`benchmarks/granularity.py` from the runs' report.json. {versions}.",
        "",
        f"![score over tokens]({plot})",
        "",
        "Macro score over the domains on held-out prompts, sampled at T = 1, after the last step; "
        "how far it is behind the reverse KL of the whole vocabulary (paired, 95% interval); "
        "tokens that carried loss, of all runs together.",
        "",
        f"| | mean | {seeds} | {gaps} | tokens |",
        "|---" * (2 * count + 3) + "|",
    ]
    for way in ("base", *ways(reports), "oracle"):
        found = [report["checkpoints"][way]["macro"] for report in reports]
        behind = [report["differences"].get(f"opd-{way}", {}).get("macro") for report in reports]
        tokens = sum(report["tokens"].get(way, 0) for report in reports)
        cells = [
            name_of(way),
            f"{mean(cell['score'] for cell in found):.3f}",
            *(f"{x['score']:.3f} [{x['low']:.2f}, {x['high']:.2f}]" for x in found),
            *(
                f"{x['difference']:.3f} [{x['low']:.2f}, {x['high']:.2f}]" if x else ""
                for x in behind
            ),
            f"{tokens:,}" if way in ways(reports) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *over_tokens(reports)]) + "\n"


def over_tokens(reports: Sequence[Json]) -> list[str]:
    """The plot's numbers."""
    first = reports[0]["progress"]["opd"]
    heads = " | ".join(f"{100 * i / (len(first) - 1):.0f}%" for i in range(len(first)))
    lines = [
        "Score while it learns (fewer prompts than above), the mean over the runs, by the share of "
        "the steps done; the step's tokens with loss are the plot's axis.",
        "",
        f"| | {heads} |",
        "|---" * (len(first) + 1) + "|",
    ]
    for way in ways(reports):
        scores = mean_over(reports, way).values
        lines.append(f"| {name_of(way)} | {' | '.join(f'{score:.3f}' for score in scores)} |")
    return lines


def mean_over(reports: Sequence[Json], way: str, colour: int = 1) -> Series:
    """The runs' mean score at each of the stage's measurements, and their mean tokens."""
    points = list(zip(*(report["progress"][way] for report in reports), strict=True))
    tokens = [mean(point["tokens_seen"] for point in at_once) for at_once in points]
    scores = [mean(point["macro"] for point in at_once) for at_once in points]
    return Series(name_of(way), tokens, scores, colour)


def picture(reports: Sequence[Json]) -> str:
    lines = [mean_over(reports, way, i % 7 + 1) for i, way in enumerate(ways(reports))]
    return chart(lines, unit="score", along="tokens with loss")


if __name__ == "__main__":
    main()
