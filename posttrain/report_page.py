"""The report's sections as the template needs them: every figure spelled, every bar placed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from posttrain.report_data import EVALUATE, Run, is_score
from posttrain.report_numbers import ABLATION, MACRO, MERGED, Cell, Numbers
from posttrain.report_plots import Series, line_panel
from posttrain.report_words import (
    decimal,
    duration,
    is_outside_zero,
    label,
    percent,
    signed,
    span,
    thousands,
)

GROUPS = (
    ("base", "Start"),
    ("sft", "After SFT on their own domain"),
    ("grpo", "After GRPO on their own domain"),
    ("specialist", "Specialists"),
    ("teacher", "Teachers from elsewhere"),
    ("", "Merged"),
    ("ablation", "Other ways to distil the same teachers"),
    ("oracle", "Each prompt to its own specialist"),
)
DIFFERENCES = {
    "sft-base": "SFT over the base, own domain",
    "specialist-sft": "Specialist over its SFT, own domain",
    "specialist-grpo": "Specialist over its GRPO, own domain",
    "opd-average": "OPD over the weight average",
    "opd-ties": "OPD over TIES",
    "opd-mixed": "OPD over mixed training",
    "opd-oracle": "OPD over the oracle",
}
OPD_PANELS = (
    ("kl", "KL to the teacher", "nats, log scale"),
    ("entropy", "Entropy", "nats"),
    ("length", "Response length", "tokens"),
)
LOSSES = (("base", "base"), ("SFT by domain", "sft/"), ("Best of own answers", "best_of/"))
TERM = "term/"
"""What GRPO logs of each term of a reward."""
NUM_PROMPTS_SHOWN = 2
MARK = re.compile("(<[^<>]*｜[^<>]*>|</?think>|</?tool_result>)")
"""V4's control tokens inside a transcript."""
PLAIN = str.maketrans("｜▁", "|_")
"""Their two characters that many fonts lack."""


@dataclass(frozen=True)
class Panel:
    """A chart with its heading."""

    title: str
    unit: str
    chart: Markup


def score_table(numbers: Numbers, domains: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of rows; the best merged score of each column is marked, and each cell has a tint."""
    columns = [*domains, MACRO]
    best = {column: best_merged(numbers, column) for column in columns}
    groups: list[dict[str, Any]] = []
    for kind, heading in GROUPS:
        rows = [
            {
                "name": name,
                "label": label(name),
                "cells": [score_cell(numbers, name, column, best[column]) for column in columns],
                "headroom": captured(numbers, name, MACRO),
                "headroom_span": percent_span(numbers, name),
            }
            for name in numbers.checkpoints
            if group_of(name) == kind
        ]
        if rows:
            groups.append({"heading": heading, "rows": rows, "kind": kind or "merged"})
    return groups


def group_of(name: str) -> str:
    """The group a checkpoint's row stands in; what is unknown stands with the merged ones."""
    kind = "ablation" if name.startswith(ABLATION) else name.split("/")[0]
    return kind if kind in dict(GROUPS) else ""


def best_merged(numbers: Numbers, column: str) -> float | None:
    """The highest score of a column among the merged checkpoints, to the digits shown."""
    rows = (numbers.checkpoints[name] for name in MERGED if name in numbers.checkpoints)
    scores = [row[column]["score"] or 0.0 for row in rows if column in row]
    return round(max(scores), 2) if len(scores) > 1 else None


def score_cell(
    numbers: Numbers, name: str, column: str, best: float | None
) -> dict[str, Any] | None:
    """One score as the table shows it; None where the checkpoint was not scored there."""
    cell = numbers.checkpoints[name].get(column)
    if cell is None:
        return None
    score = cell["score"] or 0.0
    return {
        "score": decimal(score),
        "span": f"{decimal(cell['low'])}–{decimal(cell['high'])}",
        "greedy": decimal(cell["greedy"]),
        "n": cell["n"],
        "tint": round(100 * min(1.0, max(0.0, score))),
        "is_best": name in MERGED and best is not None and round(score, 2) == best,
        "is_own": name.split("/")[-1] == column,
    }


def captured(numbers: Numbers, name: str, column: str) -> str:
    """The headroom captured; a dash where the oracle's lead cannot be told from noise."""
    is_sure = numbers.headroom_intervals[name].get(column) is not None
    return percent(numbers.headroom[name].get(column) if is_sure else None)


def percent_span(numbers: Numbers, name: str) -> str:
    """`93% to 99%`, or nothing where there is no interval, or none but a point by definition."""
    interval = numbers.headroom_intervals[name].get(MACRO)
    if interval is None or name in {"base", "oracle"}:
        return ""
    return f"{percent(interval[0])} to {percent(interval[1])}"


def score_bars(numbers: Numbers, domains: Sequence[str]) -> list[dict[str, Any]]:
    """One panel per column, macro first: base, merged checkpoints, oracle, on one scale."""
    names = [n for n in ("base", *MERGED, "oracle") if n in numbers.checkpoints]
    cells = {n: numbers.checkpoints[n] for n in names}
    top = max([1.0, *(cell["high"] or 0 for row in cells.values() for cell in row.values())])
    low = min([0.0, *(cell["low"] or 0 for row in cells.values() for cell in row.values())])

    def place(value: float | int | None) -> float:
        return round(100 * ((value or 0.0) - low) / (top - low), 2)

    def bar(name: str, column: str) -> dict[str, Any]:
        cell: Cell = cells[name][column]
        return {
            "name": name,
            "label": label(name),
            "score": decimal(cell["score"]),
            "span": span(cell),
            "headroom": captured(numbers, name, column),
            "at": place(cell["score"]),
            "low": place(cell["low"]),
            "high": place(cell["high"]),
        }

    return [
        {"title": column, "bars": [bar(name, column) for name in names if column in cells[name]]}
        for column in (MACRO, *domains)
    ]


def difference_table(numbers: Numbers, domains: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of paired differences; a cell is marked where its interval leaves zero out."""

    def spelled(cell: Cell | None) -> dict[str, str] | None:
        if cell is None:
            return None
        sign = "up" if (cell["difference"] or 0) > 0 else "down"
        return {
            "value": signed(cell["difference"]),
            "span": span(cell),
            "kind": sign if is_outside_zero(cell) else "level",
        }

    return [
        {"label": words, "cells": [spelled(row.get(column)) for column in (*domains, MACRO)]}
        for key, row in numbers.differences.items()
        for words in [DIFFERENCES.get(key, f"OPD over {label(key.removeprefix('opd-'))}")]
    ]


def curves(run: Run, domains: Sequence[str]) -> list[dict[str, Any]]:
    """Small multiples: GRPO's reward, its terms, OPD's figures by domain, supervised losses."""
    grpo = [n for n in run.records if n.startswith("grpo/") and has(run, n, "reward")]
    rewards = [
        Panel(n, "", panel([series_of(run, n, "reward", domains)], "reward", is_share=True))
        for n in grpo
    ]
    distilled = [
        Panel(title, unit, panel(lines, key, is_log=key == "kl"))
        for key, title, unit in OPD_PANELS
        if (lines := series_by_domain(run, "opd", key, domains))
    ]
    losses = [
        Panel(title, "", panel(lines, "loss"))
        for title, start in LOSSES
        if (lines := series_by_stage(run, start, "loss", domains))
    ]
    by_domain = legend(domains)
    sections = (
        ("Reward of each GRPO step", "mean over the step's samples", rewards, []),
        ("Terms of the reward", "mean over the step's samples", *term_curves(run, grpo)),
        ("On-policy distillation", "per token and response, by step", distilled, by_domain),
        ("Score over tokens", "sampled, by tokens with loss", *score_curves(run, domains)),
        ("Supervised loss", "nats per token, by step", losses, by_domain),
    )
    return [
        {"heading": heading, "unit": unit, "panels": panels, "legend": words}
        for heading, unit, panels, words in sections
        if panels
    ]


def term_curves(run: Run, stages: Sequence[str]) -> tuple[list[Panel], list[tuple[str, int]]]:
    """What the terms of a reward gave, of the stages whose reward has several; and which line is
    whose."""
    keys = {
        stage: sorted({k for r in run.records[stage] for k in r if k.startswith(TERM)})
        for stage in stages
    }
    several = {stage: terms for stage, terms in keys.items() if len(terms) > 1}
    names = sorted({term for terms in several.values() for term in terms})
    colours = {name: i % 7 + 1 for i, name in enumerate(names)}
    panels = [
        Panel(
            stage,
            "",
            panel(
                [
                    replace(series_of(run, stage, term, (), term), colour=colours[term])
                    for term in terms
                    if has(run, stage, term)
                ],
                "term",
            ),
        )
        for stage, terms in several.items()
    ]
    return panels, [(name.removeprefix(TERM), colour) for name, colour in colours.items()]


def score_curves(run: Run, domains: Sequence[str]) -> tuple[list[Panel], list[tuple[str, int]]]:
    """Distillation's score while it runs, beside its ablations', and which line is whose."""
    progress = {n: points for n, points in run.progress.items() if len(points) > 1}
    colours = {name: i % 7 + 1 for i, name in enumerate(progress)}
    panels: list[Panel] = []
    for column in (MACRO, *domains) if progress else ():
        lines: list[Series] = []
        for name, points in progress.items():
            known = [p for p in points if p[column] is not None]
            seen, scores = ([p[key] or 0.0 for p in known] for key in ("tokens_seen", column))
            lines += [Series(name, seen, scores, colours[name])] if known else []
        if lines:
            panels.append(Panel(column, "", panel(lines, "score", is_share=True)))
    return panels, [(label(name), colour) for name, colour in colours.items()]


def panel(
    lines: Sequence[Series], unit: str, *, is_share: bool = False, is_log: bool = False
) -> Markup:
    """The lines in one chart."""
    return line_panel(lines, unit=unit, is_share=is_share, is_log=is_log)


def legend(domains: Sequence[str]) -> list[tuple[str, int]]:
    """The domains with their colours."""
    return [(domain, colour_of(domain, domains)) for domain in domains]


def series_by_domain(run: Run, stage: str, key: str, domains: Sequence[str]) -> list[Series]:
    """The lines `<key>/<domain>` of one stage, for the domains that have one."""
    keys = [f"{key}/{domain}" for domain in domains]
    return [series_of(run, stage, k, domains, k) for k in keys if has(run, stage, k)]


def series_by_stage(run: Run, start: str, key: str, domains: Sequence[str]) -> list[Series]:
    """One figure of all stages whose names start alike."""
    names = [name for name in run.records if name.startswith(start) and has(run, name, key)]
    return [series_of(run, name, key, domains) for name in names]


def has(run: Run, stage: str, key: str) -> bool:
    """Whether a stage logged a figure at least twice: one point is no curve."""
    return sum(record.get(key) is not None for record in run.records.get(stage, [])) > 1


def series_of(run: Run, stage: str, key: str, domains: Sequence[str], name: str = "") -> Series:
    """A stage's figure by step, without the steps that lack it, in the colour of its domain."""
    points = [(r["step"], r[key]) for r in run.records[stage] if r.get(key) is not None]
    steps, values = [float(s) for s, _ in points], [float(v) for _, v in points]
    return Series(name or stage, steps, values, colour_of(name or stage, domains))


def colour_of(name: str, domains: Sequence[str]) -> int:
    """A domain's colour, 1 to 7, by its column; 8 for what belongs to none."""
    domain = name.split("/", 1)[-1]
    return domains.index(domain) % 7 + 1 if domain in domains else 8


def sample_cards(
    run: Run, domains: Sequence[str], oracle: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Domains with their first prompts, each with the answers of base, specialist and student."""
    sections: list[dict[str, Any]] = []
    for domain in domains:
        own = oracle.get(domain, f"specialist/{domain}")
        shown = (("base", "Base"), (own, "Specialist"), ("opd", "OPD"))
        by_prompt: dict[str, dict[str, Any]] = {}
        for name, who in shown:
            for line in run.transcripts.get(name, []):
                if line["domain"] == domain:
                    card = by_prompt.setdefault(line["prompt_id"], new_card(line["prompt"]))
                    card["answers"].append(answer_of(who, line))
        cards = list(by_prompt.values())[:NUM_PROMPTS_SHOWN]
        if cards:
            sections.append({"domain": domain, "cards": cards})
    return sections


def new_card(prompt: str) -> dict[str, Any]:
    """A prompt without answers yet."""
    return {"prompt": prompt, "answers": []}


def answer_of(who: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """One transcript, its text in pieces: every second one is a control token."""
    text = str(line["answer"])
    text = text if "\n" in text else text.removeprefix("assistant: ")
    return {
        "who": who,
        "pieces": [piece.translate(PLAIN) for piece in MARK.split(text)],
        "raw": line["raw"],
        "is_cut": line["finish_reason"] == "length",
        "score": "?" if line["score"] is None else decimal(line["score"]),
        "is_good": (line["score"] or 0.0) >= 0.5,
        "reason": line["reason"],
    }


def time_bars(run: Run) -> list[dict[str, Any]]:
    """Wall time and tokens with loss by stage, in the order of the run; evaluations are one bar."""
    seconds = {name: s for name, s in run.seconds.items() if not is_score(name)}
    scored = [s for name, s in run.seconds.items() if name.startswith(EVALUATE)]
    if scored:
        seconds[f"evaluation of {len(scored)} checkpoints"] = sum(scored)
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        {
            "name": name,
            "time": duration(s),
            "width": round(100 * s / longest, 2),
            "tokens": thousands(run.tokens[name]) if name in run.tokens else "",
        }
        for name, s in seconds.items()
    ]


def left_out(run: Run) -> list[dict[str, Any]]:
    """Prompts too near to a test's that a stage did not train on, with the nearest pair."""
    return [
        {
            "stage": stage,
            "domain": domain,
            "count": found["num_left_out"],
            "of": found["num_train"],
            "rule": f"over {found['max_overlap']:g} of runs of {found['num_words']} words",
            "nearest": found["pairs"][0] if found["pairs"] else None,
        }
        for stage, by_domain in run.overlaps.items()
        for domain, found in by_domain.items()
    ]


def failures_of(run: Run) -> dict[str, dict[str, dict[str, int]]]:
    """Answers that no reward could judge: stage -> domain -> kind -> count, without the zeros."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, records in run.records.items():
        kinds = {"in training": "grader_failures", "judge_unparsed in training": "judge_unparsed"}
        counts = {kind: sum(int(r.get(key) or 0) for r in records) for kind, key in kinds.items()}
        if any(counts.values()):
            counts = {kind: count for kind, count in counts.items() if count}
            found[name] = {name.split("/")[-1]: counts}
    for name, by_domain in run.scores.items():
        failed = {d: scores["failures"] for d, scores in by_domain.items() if scores["failures"]}
        if failed:
            found[f"{EVALUATE}{name}"] = failed
    return found
