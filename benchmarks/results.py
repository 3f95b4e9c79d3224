"""Write the results page: `python benchmarks/results.py docs/results.md RUN [RUN ...]`.

Every number comes from the runs' report.json; nothing on the page is written by hand. With
`--readme README.md` the first run's scores also replace what stands between that file's marks.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROWS = ("base", "average", "ties", "mixed", "opd", "oracle")
MARKS = ("<!-- results -->", "<!-- end of results -->")
DIFFERENCES = ("opd-average", "opd-ties", "opd-mixed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the markdown file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, each with report.json")
    parser.add_argument("--readme", type=Path, help="a file with the marks, to update as well")
    arguments = parser.parse_args()
    arguments.page.write_text(page(arguments.runs), encoding="utf-8")
    if arguments.readme:
        report = json.loads((arguments.runs[0] / "report.json").read_text("utf-8"))
        before, _, rest = arguments.readme.read_text("utf-8").partition(MARKS[0])
        table = "\n".join(["", "", report["verdict"], "", *scores(report), "", ""])
        after = rest.partition(MARKS[1])[2]
        arguments.readme.write_text(before + MARKS[0] + table + MARKS[1] + after, encoding="utf-8")


def page(runs: Sequence[Path]) -> str:
    """The page's text: a summary over all runs, then each run's tables."""
    reports = {run.name: json.loads((run / "report.json").read_text("utf-8")) for run in runs}
    versions = next(iter(reports.values()))["versions"]
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/results.py` from the runs' `report.json`. Sampled scores at T = 1",
        "on held-out prompts, with 95% intervals (bootstrap over prompts; differences are paired).",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
        "",
        *summary(reports),
    ]
    for name, report in reports.items():
        lines += [
            "",
            f"## {name}",
            "",
            *scores(report),
            "",
            *steps(report),
            "",
            *differences(report),
            *lengths(runs[list(reports).index(name)], report),
            *budget(report),
        ]
    return "\n".join(lines) + "\n"


def summary(reports: Mapping[str, Json]) -> list[str]:
    """One line a run: the merged models' headroom; its mean over the runs of each recipe."""
    lines = [
        "| run | base | oracle | OPD | headroom: average | TIES | OPD |",
        "|---|---|---|---|---|---|---|",
    ]
    captured: dict[str, list[float]] = {}
    for name, report in reports.items():
        macro = {
            row: report["checkpoints"][row]["macro"]["score"] for row in ("base", "oracle", "opd")
        }
        headroom = {row: report["headroom"][row]["macro"] for row in ("average", "ties", "opd")}
        captured.setdefault(report["name"], []).append(headroom["opd"])
        cells = [
            name,
            *(f"{v:.3f}" for v in macro.values()),
            *(f"{v:.2f}" for v in headroom.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for recipe, found in captured.items():
        mean = f"mean {sum(found) / len(found):.3f}, lowest {min(found):.3f}"
        lines += ["", f"OPD's macro headroom in {recipe} ({len(found)} run(s)): {mean}."]
    return lines


def lengths(run: Path, report: Json) -> list[str]:
    """Where domains are efforts: the mean of an answer's own tokens, from the run's scores.json."""
    domains = [domain for domain in report["checkpoints"]["base"] if "@" in domain]
    if not domains:
        return []
    lines = ["", f"| own tokens | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for row in report["checkpoints"]:
        for path in (run / "stages").glob(f"evaluate.{row.replace('/', '.')}-*/scores.json"):
            found = json.loads(path.read_text("utf-8"))["domains"]
            cells = [f"{found[domain]['mean_length']:.1f}" for domain in domains]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def budget(report: Json) -> list[str]:
    """How many tokens mixed training learned from, against the specialists and OPD together."""
    tokens = report.get("tokens", {})
    mixed = sum(count for stage, count in tokens.items() if stage.endswith("/mixed"))
    others = sum(tokens.values()) - mixed - tokens.get("base", 0)
    if not mixed:
        return []
    return [
        "",
        f"Mixed training learned from {mixed:,} tokens, all specialists and OPD together from "
        f"{others:,} (ratio {mixed / others:.2f}); the base's are not counted.",
    ]


def scores(report: Json) -> list[str]:
    """The merged checkpoints by domain."""
    checkpoints = report["checkpoints"]
    domains = list(checkpoints["base"])
    lines = [f"| | {' | '.join(domains)} | headroom |", "|---" * (len(domains) + 2) + "|"]
    for row in (row for row in ROWS if row in checkpoints):
        cells = [interval(checkpoints[row][d], "score") for d in domains]
        macro = report["headroom"].get(row, {}).get("macro")
        lines.append(f"| {row} | {' | '.join(cells)} | {'' if macro is None else f'{macro:.2f}'} |")
    return lines


def steps(report: Json) -> list[str]:
    """Each specialist on its own domain: base, after SFT, after GRPO."""
    checkpoints = report["checkpoints"]
    lines = ["| own domain | base | SFT | specialist | specialist - SFT |", "|---|---|---|---|---|"]
    for domain in (d for d in checkpoints["base"] if d != "macro"):
        names = [n for n in ("base", f"sft/{domain}", f"specialist/{domain}") if n in checkpoints]
        cells = [interval(checkpoints[n][domain], "score") for n in names]
        gain = report["differences"].get("specialist-sft", {}).get(domain)
        cells.append(interval(gain, "difference") if gain else "")
        lines.append(f"| {domain} | {' | '.join(cells)} |")
    return lines


def differences(report: Json) -> list[str]:
    """What OPD gains over the other merges."""
    found = {
        name: report["differences"][name] for name in DIFFERENCES if name in report["differences"]
    }
    domains = list(next(iter(found.values())))
    lines = [f"| difference | {' | '.join(domains)} |", "|---" * (len(domains) + 1) + "|"]
    for name, by_domain in found.items():
        lines.append(
            f"| {name} | {' | '.join(interval(by_domain[d], 'difference') for d in domains)} |"
        )
    return lines


def interval(numbers: Json, key: str) -> str:
    """`0.92 [0.90, 0.94]`."""
    return f"{numbers[key]:.2f} [{numbers['low']:.2f}, {numbers['high']:.2f}]"


if __name__ == "__main__":
    main()
