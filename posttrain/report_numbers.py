"""The report's figures: the table, the headroom captured, the paired differences.

    macro(x)     mean over domains of x's score
    oracle       each prompt routed to its own specialist: domain d's scores are specialist/<d>'s
    headroom(x)  (x - base) / (oracle - base), null where the oracle does not beat the base

All intervals of comparisons come from one set of resampled prompts, stratified by domain, so that
what two checkpoints share cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.intervals import Array, bootstrap_means, percentile_interval
from posttrain.report_data import Run, check_same_prompts

MACRO = "macro"
MERGED = ("average", "ties", "mixed", "opd")
COMPARISONS = (
    ("sft", "base"),
    ("specialist", "sft"),
    ("specialist", "grpo"),
    ("opd", "average"),
    ("opd", "ties"),
    ("opd", "mixed"),
    ("opd", "oracle"),
)
"""Pairs whose difference is reported; `sft`, `grpo` and `specialist` stand for a domain's own.
Besides, distillation is compared with each of its ablations."""
ABLATION = "opd/"
"""How the names of ablations begin."""

Cell = dict[str, float | int | None]
Table = dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Numbers:
    """What report.json holds of scores; every figure is rounded to six digits."""

    checkpoints: Table
    """NAME -> DOMAIN or macro -> score, low, high, n, greedy."""
    headroom: dict[str, dict[str, float | None]]
    headroom_intervals: dict[str, dict[str, list[float] | None]]
    """NAME -> DOMAIN or macro -> [low, high]."""
    differences: Table
    """"opd-ties" -> DOMAIN or macro -> difference, low, high."""


@dataclass(frozen=True)
class Means:
    """Mean scores by domain, then checkpoint: the figure itself, and its resamples (B,)."""

    point: dict[str, dict[str, float]]
    resampled: dict[str, dict[str, Array]]


def compute_numbers(
    run: Run,
    domains: Sequence[str],
    *,
    oracle: Mapping[str, str],
    num_resamples: int,
    seed: int,
) -> Numbers:
    """All figures of a run. `oracle` names the checkpoint that answers a domain's prompts where it
    is not `specialist/<domain>`. Raises DataError where checkpoints met different prompts."""
    check_same_prompts(run, domains)
    scores = with_oracle(run.scores, domains, oracle)
    means = add_macro(resample(scores, domains, num_resamples=num_resamples, seed=seed))
    ablations = [("opd", name) for name in scores if name.startswith(ABLATION)]
    return Numbers(
        checkpoints={name: table_row(name, scores[name], means) for name in ordered(scores)},
        headroom={name: headroom(name, means) for name in ordered(scores)},
        headroom_intervals={name: headroom_intervals(name, means) for name in ordered(scores)},
        differences={
            f"{x}-{y}": found
            for x, y in (*COMPARISONS, *ablations)
            if (found := differences(x, y, means))
        },
    )


def ordered(names: Mapping[str, Any]) -> list[str]:
    """Base, SFT, GRPO, specialists, what else there is, ablations, the merged ones, the oracle."""
    last = (*MERGED, "oracle")

    def rank(name: str) -> tuple[int, int]:
        if name in last:
            return 5, last.index(name)
        kinds = ("base", "sft", "grpo", "specialist")
        kind = name.split("/")[0]
        return (kinds.index(kind) if kind in kinds else 4), 0

    return sorted(names, key=rank)


def with_oracle(
    scores: Mapping[str, Mapping[str, Any]], domains: Sequence[str], oracle: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The scores, with the oracle's taken from each domain's specialist where it was scored."""
    routed: dict[str, Any] = {}
    for domain in domains:
        source = scores.get(oracle.get(domain, f"specialist/{domain}"), {})
        if domain in source:
            routed[domain] = source[domain]
    kept = {
        name: {domain: by_domain[domain] for domain in domains if domain in by_domain}
        for name, by_domain in scores.items()
    }
    return {**kept, "oracle": routed} if routed else kept


def resample(
    scores: Mapping[str, Mapping[str, Any]],
    domains: Sequence[str],
    *,
    num_resamples: int,
    seed: int,
) -> Means:
    """Every domain's prompts resampled, for all its checkpoints together."""
    point: dict[str, dict[str, float]] = {}
    resampled: dict[str, dict[str, Array]] = {}
    for index, domain in enumerate(domains):
        names = [name for name in scores if domain in scores[name]]
        point[domain] = {name: float(scores[name][domain]["score"]) for name in names}
        if not names:
            continue
        values_PM = np.array([scores[name][domain]["per_prompt"] for name in names]).T
        means_BM = bootstrap_means(values_PM, num_resamples=num_resamples, seed=(seed, index))
        resampled[domain] = {name: means_BM[:, i] for i, name in enumerate(names)}
    return Means(point, resampled)


def add_macro(means: Means) -> Means:
    """The same with the mean over domains, for the checkpoints scored on all of them."""
    domains = list(means.point)
    complete = [n for n in means.point[domains[0]] if all(n in means.point[d] for d in domains)]
    point = {n: sum(means.point[d][n] for d in domains) / len(domains) for n in complete}
    resampled = {
        n: np.stack([means.resampled[d][n] for d in domains]).mean(axis=0) for n in complete
    }
    return Means({**means.point, MACRO: point}, {**means.resampled, MACRO: resampled})


def table_row(name: str, by_domain: Mapping[str, Any], means: Means) -> dict[str, Cell]:
    """One checkpoint's cells, the macro score last."""
    keys = ("score", "low", "high", "n", "greedy")
    cells: dict[str, Cell] = {
        domain: {key: rounded(scores[key]) for key in keys} for domain, scores in by_domain.items()
    }
    if name in means.point[MACRO]:
        interval = percentile_interval(means.resampled[MACRO][name])
        greedy = [scores["greedy"] for scores in by_domain.values()]
        cells[MACRO] = {
            "score": rounded(means.point[MACRO][name]),
            "low": rounded(interval.low),
            "high": rounded(interval.high),
            "n": sum(scores["n"] for scores in by_domain.values()),
            "greedy": None if None in greedy else rounded(sum(greedy) / len(greedy)),
        }
    return cells


def headroom(name: str, means: Means) -> dict[str, float | None]:
    """The headroom captured, by domain and macro."""
    found: dict[str, float | None] = {}
    for domain, point in means.point.items():
        if name in point:
            base, oracle = point.get("base"), point.get("oracle")
            gain = 0.0 if base is None or oracle is None else oracle - base
            found[domain] = rounded((point[name] - (base or 0.0)) / gain) if gain > 0 else None
    return found


def headroom_intervals(name: str, means: Means) -> dict[str, list[float] | None]:
    """Their intervals; None where some resample takes the oracle's lead away."""
    found: dict[str, list[float] | None] = {}
    for domain, resampled in means.resampled.items():
        if name not in resampled:
            continue
        found[domain] = None
        if "base" in resampled and "oracle" in resampled:
            gain_B = resampled["oracle"] - resampled["base"]
            if gain_B.min() > 0:  # else the ratio's interval has no bounds
                interval = percentile_interval((resampled[name] - resampled["base"]) / gain_B)
                found[domain] = [round(interval.low, 6), round(interval.high, 6)]
    return found


def differences(x: str, y: str, means: Means) -> dict[str, Cell]:
    """x - y by domain, and the mean of these where every domain has both."""
    cells: dict[str, Cell] = {}
    points: list[float] = []
    resamples: list[Array] = []
    domains = [domain for domain in means.point if domain != MACRO]
    for domain in domains:
        point, resampled = means.point[domain], means.resampled.get(domain, {})
        own_x, own_y = (side if side in point else f"{side}/{domain}" for side in (x, y))
        if own_x in point and own_y in point:
            points.append(point[own_x] - point[own_y])
            resamples.append(resampled[own_x] - resampled[own_y])
            cells[domain] = difference_cell(points[-1], resamples[-1])
    if cells and len(cells) == len(domains):
        macro_B = np.stack(resamples).mean(axis=0)
        cells[MACRO] = difference_cell(sum(points) / len(points), macro_B)
    return cells


def difference_cell(point: float, resamples_B: Array) -> Cell:
    """A difference with its interval."""
    interval = percentile_interval(resamples_B)
    return {
        "difference": rounded(point),
        "low": rounded(interval.low),
        "high": rounded(interval.high),
    }


def rounded(value: float | int | None) -> float | int | None:
    """To six digits: below them a sum's order shows."""
    return round(value, 6) if isinstance(value, float) else value
