"""The table of docs/backbone.md out of the numbers that the other benchmarks of the backbone left
beside their pages: `python benchmarks/backbone_table.py`."""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

PAGE = Path("docs/backbone.md")
BEGIN, END = "<!-- by benchmarks/backbone_table.py -->\n", "<!-- end -->\n"


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text("utf-8"), PAGE.parent), encoding="utf-8")


def filled(page: str, folder: Path) -> str:
    """The page with its table as the numbers in `folder` have it."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(table(folder)) + "\n\n" + END + after


def table(folder: Path) -> list[str]:
    laws, speed, context, fp4 = (
        json.loads((folder / f"backbone-{name}.json").read_text("utf-8"))
        for name in ("laws", "speed", "context", "fp4")
    )
    found = [(law["what"], law["stock"], law["ours"], "", laws["date"]) for law in laws["rows"]]
    for row in speed["rows"]:
        found += timed(row, row.get("date", speed["date"]))
    last = context["rows"][-1]
    found.append(
        (
            f"prefill of {last['tokens']:,} tokens: peak MiB, cache MiB",
            "",
            f"{last['peak_mib']:.0f}, {last['cache_bytes'] / 2**20:.0f}",
            "",
            context["date"],
        )
    )
    saved = fp4["rows"][-1]
    found += [
        (
            "109M parameters in FP4: loading, MiB held",
            "",
            f"{saved['held_mib']:.0f}",
            "",
            fp4["date"],
        ),
        ("saving them again, MiB above", "", f"{saved['save_mib']:.0f}", "", fp4["date"]),
    ]
    lines = ["| | stock | ours | stock / ours | day |", "|---|---|---|---|---|"]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in found)]


def timed(row: Json, date: str) -> list[tuple[str, str, str, str, str]]:
    """A row of backbone-speed.json: seconds, and peak memory where it is known."""
    seconds, memory = row["processor_s"], row.get("peak_mib", {})
    found = [(f"{row['name']}: s", *versus(seconds, ".3g"), date)]
    if memory:
        found.append((f"{row['name']}: peak MiB", *versus(memory, ",.0f"), date))
    return found


def versus(of: Json, form: str) -> tuple[str, str, str]:
    if "stock" not in of:
        return "", format(of["ours"], form), ""
    ratio = of["stock"] / of["ours"]
    return format(of["stock"], form), format(of["ours"], form), f"{ratio:.2f}"


if __name__ == "__main__":
    main()
