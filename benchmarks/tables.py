"""The tables of docs/backbone.md and docs/distillation.md, out of the numbers that the benchmarks
left beside their own pages: `python benchmarks/tables.py`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Cells = tuple[str, ...]

DOCS = Path("docs")
BEGIN, END = "<!-- by benchmarks/tables.py -->\n", "<!-- end -->\n"


def main() -> None:
    for name in TABLES:
        page = DOCS / name
        page.write_text(filled(page.read_text("utf-8"), page), encoding="utf-8")


def filled(text: str, page: Path) -> str:
    """The page's text with its table as the numbers beside it have it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(TABLES[page.name](page.parent)) + "\n\n" + END + after


def read(folder: Path, name: str) -> Json:
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def table(head: Cells, rows: Sequence[Cells]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def of_backbone(folder: Path) -> list[str]:
    laws, speed, context, fp4 = (
        read(folder, f"backbone-{name}") for name in ("laws", "speed", "context", "fp4")
    )
    found = [(law["what"], law["stock"], law["ours"], "", laws["date"]) for law in laws["rows"]]
    for row in speed["rows"]:
        found += timed(row, row.get("date", speed["date"]))
    last, saved = context["rows"][-1], fp4["rows"][-1]
    sizes = f"{last['peak_mib']:.0f}, {last['cache_bytes'] / 2**20:.0f}"
    prefill = f"prefill of {last['tokens']:,} tokens: peak MiB, cache MiB"
    held, more = f"{saved['held_mib']:.0f}", f"{saved['save_mib']:.0f}"
    found += [
        (prefill, "", sizes, "", context["date"]),
        ("109M parameters in FP4: loading, MiB held", "", held, "", fp4["date"]),
        ("saving them again, MiB above", "", more, "", fp4["date"]),
    ]
    return table(("", "stock", "ours", "stock / ours", "day"), found)


def of_distillation(folder: Path) -> list[str]:
    """Ours beside each peer: seconds (of the loss over its floor), memory, and both as ratios."""
    found: list[Cells] = []
    loss = read(folder, "reverse-kl")
    for row in loss["rows"]:
        own = next(x for x in loss["rows"] if x["sizes"] == row["sizes"] and x["peer"] == "ours")
        if row is not own:
            floors = [x["seconds"] / x["floor_seconds"] for x in (own, row)]
            memory = [x["peak_mib"] - x["gradients_mib"] for x in (own, row)]
            name = f"loss, V = {row['sizes'][2]:,}: floors"
            found.append(
                versus_peer(name, row["peer"], floors, memory, row.get("date", loss["date"]))
            )
    for row in (steps := read(folder, "opd-step"))["rows"]:
        own = next(
            x
            for x in steps["rows"]
            if x["vocabulary"] == row["vocabulary"] and x["peer"] == "posttrain"
        )
        if row is not own:
            seconds = [x["processor_s"] for x in (own, row)]
            memory = [x["peak_mib"] for x in (own, row)]
            name = f"a whole step, V = {row['vocabulary']:,}: s"
            found.append(versus_peer(name, row["peer"], seconds, memory, row["date"]))
    rollouts = [
        {**row, "way": row["way"].split("/")} for row in read(folder, "rollout-speed")["rows"]
    ]
    for preset in dict.fromkeys(row["way"][0] for row in rollouts):
        ways = [row for row in rollouts if row["way"][0] == preset]
        own = fastest(ways, "posttrain")
        for peer in dict.fromkeys(row["way"][1] for row in ways if row["way"][1] != "posttrain"):
            row = fastest(ways, peer)
            seconds = [x["processor_s"] for x in (own, row)]
            memory = [x["peak_mib"] for x in (own, row)]
            name = f"256 rollouts, {preset}, each at its best width: s"
            found.append(versus_peer(name, peer, seconds, memory, row["date"]))
    pool = read(folder, "teachers-pool")
    two = [pool["two resident"], pool["two resident, again"]]
    seconds, memory = (
        [pool["pool of one"][key], sum(x[key] for x in two) / 2]
        for key in ("processor_s", "anonymous_mib")
    )
    name = f"{pool['teachers']} teachers through a pool of one: s"
    found.append(versus_peer(name, "two resident", seconds, memory, pool["date"]))
    head = ("", "beside", "ours", "theirs", "times", "ours MiB", "theirs MiB", "of theirs", "day")
    return table(head, found)


def fastest(ways: Sequence[Json], who: str) -> Json:
    return min((row for row in ways if row["way"][1] == who), key=lambda row: row["processor_s"])


def versus_peer(
    name: str, peer: str, seconds: Sequence[float], memory: Sequence[float], day: str
) -> Cells:
    """A row of `of_distillation`; ours stands first in both pairs."""
    times, share = seconds[1] / seconds[0], memory[0] / memory[1]
    shown = (f"{seconds[0]:.3g}", f"{seconds[1]:.3g}", f"{times:.2f}")
    return (name, peer, *shown, f"{memory[0]:,.0f}", f"{memory[1]:,.0f}", f"{share:.2f}", day)


def timed(row: Json, date: str) -> list[Cells]:
    """A row of backbone-speed.json: seconds, and peak memory where it is known."""
    seconds, memory = row["processor_s"], row.get("peak_mib", {})
    found: list[Cells] = [(f"{row['name']}: s", *versus(seconds, ".3g"), date)]
    if memory:
        found.append((f"{row['name']}: peak MiB", *versus(memory, ",.0f"), date))
    return found


def versus(of: Json, form: str) -> tuple[str, str, str]:
    if "stock" not in of:
        return "", format(of["ours"], form), ""
    ratio = of["stock"] / of["ours"]
    return format(of["stock"], form), format(of["ours"], form), f"{ratio:.2f}"


TABLES: dict[str, Callable[[Path], list[str]]] = {
    "backbone.md": of_backbone,
    "distillation.md": of_distillation,
}

if __name__ == "__main__":
    main()
