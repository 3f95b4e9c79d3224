"""What the report says in words: names of checkpoints, the verdict, the figures' spelling."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report_numbers import MACRO, Cell, Numbers

LABELS = {
    "base": "Base",
    "average": "Average",
    "ties": "TIES",
    "mixed": "Mixed training",
    "opd": "OPD",
    "oracle": "Oracle",
}
BASELINES = {"ties": "TIES", "average": "the weight average", "mixed": "mixed training"}
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def label(name: str) -> str:
    """`sft/code` -> `code`: the group's heading says the rest."""
    return LABELS.get(name, name.split("/", 1)[-1])


def decimal(value: float | int | None) -> str:
    """Two digits after the point, with a true minus sign; a dash for nothing."""
    if value is None:
        return "–"
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def signed(value: float | int | None) -> str:
    """The same with a plus sign where it is positive."""
    text = decimal(value)
    return text if value is None or value <= 0 or text == "0.00" else f"+{text}"


def percent(value: float | None) -> str:
    """A share in whole percent."""
    if value is None:
        return "–"
    text = f"{100 * value:.0f}%"
    return "0%" if text == "-0%" else text.replace("-", "−")


def span(cell: Cell) -> str:
    """`[0.61, 0.68]`."""
    return f"[{decimal(cell['low'])}, {decimal(cell['high'])}]"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def thousands(count: int) -> str:
    """`41k` for 41,250; counts below a thousand in full."""
    return f"{count:,}" if count < 1000 else f"{count / 1000:,.0f}k"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def is_outside_zero(cell: Cell) -> bool:
    """Whether a difference's interval leaves zero out."""
    return (cell["low"] or 0) > 0 or (cell["high"] or 0) < 0


def verdict(numbers: Numbers, domains: Sequence[str]) -> list[str]:
    """The run in a few sentences, the most important first."""
    macro = {name: row[MACRO] for name, row in numbers.checkpoints.items() if MACRO in row}
    if "base" not in macro or "oracle" not in macro:
        return [f"{len(numbers.checkpoints)} checkpoints were scored, without base or oracle."]
    base, oracle = macro["base"], macro["oracle"]
    count = COUNTS[len(domains)] if len(domains) < len(COUNTS) else str(len(domains))
    over = f"over {count} domain{'s' if len(domains) > 1 else ''}"
    if numbers.headroom["oracle"][MACRO] is None:
        return [
            f"The specialists do not beat the base {over} ({decimal(oracle['score'])} against "
            f"{decimal(base['score'])}), so there is nothing to capture."
        ]
    if numbers.headroom_intervals["oracle"][MACRO] is None:
        return [
            f"The specialists' lead over the base {over} ({decimal(oracle['score'])} against "
            f"{decimal(base['score'])}) cannot be told from noise, so a share of it says nothing.",
            *([f"OPD scores {decimal(macro['opd']['score'])}."] if "opd" in macro else []),
            *against_baselines(numbers),
        ]
    if "opd" not in macro:
        return [
            f"The specialists lift the macro score {over} from {decimal(base['score'])} to "
            f"{decimal(oracle['score'])}; no student was distilled."
        ]
    interval = numbers.headroom_intervals["opd"][MACRO]
    between = f" [{percent(interval[0])}, {percent(interval[1])}]" if interval else ""
    first = (
        f"OPD captures {percent(numbers.headroom['opd'][MACRO])}{between} of the headroom {over}: "
        f"it scores {decimal(macro['opd']['score'])}, where the base scores "
        f"{decimal(base['score'])} and each domain's own specialist {decimal(oracle['score'])}."
    )
    return [first, *against_baselines(numbers)]


def early_stops(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A sentence for each distillation that ended before its last step, by stage's metrics."""
    ended = [(stage, rows[-1]) for stage, rows in records.items() if rows and "stopped" in rows[-1]]
    return [
        f"{label(stage)} stopped after {row['step']} of {row['total']} steps, where every domain's "
        "KL was flat."
        for stage, row in ended
        if row["step"] < row["total"]
    ]


def against_baselines(numbers: Numbers) -> list[str]:
    """Where OPD stands against each baseline: ahead, level or behind."""
    ahead: list[str] = []
    level: list[str] = []
    behind: list[str] = []
    for name, words in BASELINES.items():
        cell = numbers.differences.get(f"opd-{name}", {}).get(MACRO)
        if cell is None:
            continue
        by = f"{words} by {decimal(abs(cell['difference'] or 0))} {span(cell)}"
        if not is_outside_zero(cell):
            level.append(f"{words} ({signed(cell['difference'])} {span(cell)})")
        elif (cell["difference"] or 0) > 0:
            ahead.append(by)
        else:
            behind.append(by)
    sentences = [f"It beats {listed(ahead)}."] if ahead else []
    if level:
        sentences.append(f"It cannot be told from {listed(level)}.")
    if behind:
        sentences.append(f"It stays behind {listed(behind)}.")
    return sentences
