"""Laws of the report: its figures by hand, and a page that stands alone, from a made-up run."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import report
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.report_config import ReportStage
from posttrain.report_data import read_run
from posttrain.report_numbers import MACRO, Numbers, compute_numbers
from posttrain.report_page import curves, score_curves, term_curves
from posttrain.report_plots import log_ticks, nice_ticks, running_mean
from posttrain.report_words import early_stops, percent, signed, verdict

DOMAINS = ["mathematics", "code", "agent", "instructions"]
NUM_PROMPTS, NUM_SAMPLES = 96, 8
RIGHT = {  # checkpoint -> share of right answers by domain, as a quickstart gives them
    "base": [0.26, 0.35, 0.47, 0.25],
    "sft/mathematics": [0.44, 0.21, 0.30, 0.18],
    "sft/code": [0.20, 0.49, 0.28, 0.17],
    "sft/agent": [0.19, 0.22, 0.74, 0.20],
    "sft/instructions": [0.22, 0.25, 0.31, 0.52],
    "specialist/mathematics": [0.86, 0.12, 0.21, 0.09],
    "specialist/code": [0.10, 0.88, 0.15, 0.12],
    "specialist/agent": [0.08, 0.11, 1.00, 0.14],
    "specialist/instructions": [0.15, 0.18, 0.22, 0.95],
    "average": [0.51, 0.49, 0.80, 0.62],
    "ties": [0.66, 0.60, 0.97, 0.79],
    "opd/forward_kl": [0.80, 0.81, 0.98, 0.90],
    "opd": [0.85, 0.86, 0.99, 0.93],
}
SAMPLES = {
    "mathematics": ("gcd(84,36)=", "assistant: 12", "assistant: 6"),
    "code": ("x:rev,up", "assistant: x[::-1].upper()", "assistant: x.upper()"),
    "agent": (
        "price of pears?",
        "assistant calls price(item='pears')\ntool: 47\nassistant: 47",
        "assistant: <｜DSML｜tool_calls>pears <script>alert(1)</script>",
    ),
    "instructions": ("kpp 2 - # & no <b>", "assistant: kpp-kpp#", "assistant: kpp kpp"),
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_evaluation(folder: Path, name: str, generator: np.random.Generator) -> None:
    domains: dict[str, Any] = {}
    for domain, share in zip(DOMAINS, RIGHT[name], strict=True):
        easy = np.random.default_rng(len(domain)).normal(size=NUM_PROMPTS)  # the prompt's own part
        chance = 1 / (1 + np.exp(-(np.log((share + 1e-9) / (1.001 - share)) + easy)))
        per_prompt = generator.binomial(NUM_SAMPLES, chance) / NUM_SAMPLES
        domains[domain] = {
            "score": float(per_prompt.mean()),
            "low": float(per_prompt.mean() - 0.04),
            "high": min(1.0, float(per_prompt.mean() + 0.04)),
            "n": NUM_PROMPTS,
            "greedy": float((chance > 0.5).mean()),
            "per_prompt": per_prompt.tolist(),
            "prompt_ids": [f"{domain}-{i}" for i in range(NUM_PROMPTS)],
            "failures": {"raised": 2} if (name, domain) == ("base", "code") else {},
        }
    write_json(folder / "scores.json", {"domains": domains})
    lines: list[str] = []
    for domain, (prompt, right, wrong) in SAMPLES.items():
        for i in range(3):
            is_right = RIGHT[name][DOMAINS.index(domain)] > 0.3 + 0.2 * i
            line = {
                "domain": domain,
                "prompt_id": f"{domain}-{i}",
                "prompt": f"{prompt} ({i + 1})",
                "answer": right if is_right else wrong,
                "raw": f"{right if is_right else wrong}<｜end▁of▁sentence｜>",
                "score": float(is_right),
                "reason": "equal" if is_right else f"{right} was expected",
                "finish_reason": "stop" if is_right or i else "length",
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "done.json", {"seconds": 5.0})


def make_training(folder: Path, records: list[dict[str, float]], seconds: float) -> None:
    folder.mkdir(parents=True)
    metrics = Metrics(folder / "metrics.jsonl", stage=folder.name)
    for i, record in enumerate(records):
        metrics.log(i + 1, len(records), **record)
    write_json(folder / "done.json", {"seconds": seconds})


def distilled(i: int, noise: Iterator[float]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for k, domain in enumerate(DOMAINS):
        figures[f"kl/{domain}"] = (0.4 + 0.3 * k) * math.exp(-i / 14 + 0.1 * next(noise)) + 0.01
        figures[f"entropy/{domain}"] = 0.1 + 0.05 * k + 0.6 * math.exp(-i / 20 + 0.1 * next(noise))
        figures[f"length/{domain}"] = 6.0 + 7 * k + next(noise)
        figures[f"tokens/{domain}"] = 100.0 + k
    if i % 15 == 14:
        scores = {f"score/{domain}": 0.4 + 0.01 * i for domain in (*DOMAINS, MACRO)}
        figures |= {**scores, "tokens_seen": 406.0 * (i + 1)}
    return figures


def make_run(folder: Path) -> dict[str, Path]:
    """The stages of a quickstart as its report would find them, by role."""
    generator = np.random.default_rng(0)
    noise = iter(generator.normal(size=10_000).tolist())
    stages: dict[str, tuple[list[dict[str, float]], float]] = {
        "base": (
            [{"loss": 0.7 + 3.5 * math.exp(-i / 60) + 0.05 * next(noise)} for i in range(400)],
            118.4,
        )
    }
    for rank, domain in enumerate(DOMAINS):
        sft = [{"loss": 0.3 + 0.5 * math.exp(-i / 6) + 0.03 * next(noise)} for i in range(20)]
        start, end = RIGHT[f"sft/{domain}"][rank], RIGHT[f"specialist/{domain}"][rank]
        rise = [1 - math.exp(-i / 15) for i in range(50)]
        rewards = [min(1.0, start + (end - start) * r + 0.04 * next(noise)) for r in rise]
        stages[f"sft/{domain}"] = (sft, 6.0 + rank)
        steps = [{"reward": r, "loss": 0.0, "tokens": 41.0} for r in rewards]
        stages[f"grpo/{domain}"] = (steps, 62.0 + 9 * rank)
    stages["grpo/code"][0][4]["grader_failures"] = 3.0
    kl = [distilled(i, noise) for i in range(60)]
    stages |= {"average": ([], 0.4), "ties": ([], 0.7), "opd": (kl, 101.3)}
    stages["opd/forward_kl"] = ([distilled(i, noise) for i in range(60)], 99.0)
    inputs: dict[str, Path] = {}
    for name, (records, seconds) in stages.items():
        inputs[f"metrics/{name}"] = folder / name.replace("/", ".")
        make_training(inputs[f"metrics/{name}"], records, seconds)
    pair = {"share": 0.75, "train": "a <b> prompt", "test": "a test's", "source": "held out"}
    told = {"domain": "code", "num_words": 8, "max_overlap": 0.5, "num_train": 90}
    path = inputs["metrics/sft/code"] / "overlaps" / "code.json"
    path.parent.mkdir()
    write_json(path, {**told, "num_left_out": 1, "pairs": [pair]})
    for name in RIGHT:
        inputs[f"evaluate/{name}"] = folder / f"evaluate.{name.replace('/', '.')}"
        make_evaluation(inputs[f"evaluate/{name}"], name, generator)
    return inputs


def make_report(out: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
    recipe = "name: quickstart\nseed: 0\nbase: {preset: tiny}\n# </pre><script>alert(2)</script>\n"
    stage = ReportStage(name="quickstart", recipe=recipe, domains=DOMAINS, num_resamples=500)
    metrics = Metrics(out / "metrics.jsonl", stage="report")
    report.work(stage, Job(out, inputs, folder=out, seed=0, num_threads=1, metrics=metrics))
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def made(
    inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("report")
    return make_report(out, inputs), (out / "report.html").read_text(encoding="utf-8")


def test_what_a_stage_left_out_of_its_training_is_told(made: tuple[dict[str, Any], str]) -> None:
    facts, page = made
    (told,) = facts["left_out"]
    assert (told["stage"], told["domain"]) == ("sft/code", "code")
    assert (told["count"], told["of"], told["nearest"]["share"]) == (1, 90, 0.75)
    assert "0.75, a &lt;b&gt; prompt / a test&#39;s (held out)" in page


def numbers_of(scores: dict[str, dict[str, list[float]]], **oracle: str) -> Numbers:
    """Numbers of hand-made scores per prompt: checkpoint -> domain -> list."""
    entries = {
        name: {
            d: {
                "score": sum(v) / len(v), "low": 0.0, "high": 1.0, "n": len(v), "greedy": None,
                "per_prompt": v, "prompt_ids": [str(i) for i in range(len(v))],
            }
            for d, v in by_domain.items()
        }
        for name, by_domain in scores.items()
    }  # fmt: skip
    run = read_run({})
    run.scores.update(entries)
    domains = list(scores["base"])
    return compute_numbers(run, domains, oracle=oracle, num_resamples=200, seed=0)


def test_every_checkpoint_has_every_domain_and_the_macro(made: tuple[dict[str, Any], str]) -> None:
    facts, _ = made
    assert set(facts["checkpoints"]) == {*RIGHT, "oracle"}
    for row in facts["checkpoints"].values():
        assert list(row) == [*DOMAINS, MACRO]
        for cell in row.values():
            assert set(cell) == {"score", "low", "high", "n", "greedy"}
            assert cell["low"] <= cell["score"] <= cell["high"]
        assert row[MACRO]["score"] == pytest.approx(
            np.mean([row[d]["score"] for d in DOMAINS]), abs=1e-6
        )


def test_tokens_are_summed_over_steps_and_domains(made: tuple[dict[str, Any], str]) -> None:
    tokens, page = made[0]["tokens"], made[1]
    assert tokens["grpo/code"] == 50 * 41
    assert tokens["opd"] == 60 * sum(100 + k for k in range(len(DOMAINS)))
    assert set(tokens) == {"opd", "opd/forward_kl", *(f"grpo/{d}" for d in DOMAINS)}  # no others
    assert "<span>2k</span>" in page


def test_seconds_are_those_of_all_stages(made: tuple[dict[str, Any], str]) -> None:
    seconds = made[0]["seconds"]
    assert seconds["opd"] == 101.3
    assert seconds["evaluate/opd"] == 5.0
    assert len(seconds) == 1 + 4 + 4 + 4 + len(RIGHT)


def test_answers_that_no_reward_could_judge_are_counted_and_shown(
    made: tuple[dict[str, Any], str],
) -> None:
    facts, page = made
    assert facts["failures"] == {
        "grpo/code": {"code": {"in training": 3}},
        "evaluate/base": {"code": {"raised": 2}},
    }
    assert "Answers no reward could judge" in page


def test_the_oracle_is_each_domains_own_specialist(made: tuple[dict[str, Any], str]) -> None:
    table = made[0]["checkpoints"]
    for domain in DOMAINS:
        assert table["oracle"][domain] == table[f"specialist/{domain}"][domain]


def test_headroom_by_hand() -> None:
    # base 0.25, oracle 0.75: average at 0.5 captures a half, opd at 0.75 all of it.
    found = numbers_of(
        {
            "base": {"a": [0.0, 0.5]},
            "specialist/a": {"a": [0.5, 1.0]},
            "average": {"a": [0.25, 0.75]},
            "opd": {"a": [1.0, 0.5]},
        }
    )
    assert {name: row[MACRO] for name, row in found.headroom.items()} == {
        "base": 0.0, "specialist/a": 1.0, "average": 0.5, "opd": 1.0, "oracle": 1.0,
    }  # fmt: skip
    # The average is 0.25 above the base on each prompt and so is certain; opd is not.
    assert found.headroom_intervals["average"]["a"] == [0.5, 0.5]
    assert found.headroom_intervals["opd"]["a"] != [1.0, 1.0]


def test_no_headroom_is_null_where_the_oracle_does_not_beat_the_base() -> None:
    found = numbers_of(
        {
            "base": {"a": [0.5, 0.5], "b": [0.0, 0.0]},
            "specialist/a": {"a": [0.5, 0.5], "b": [0.0, 0.0]},
            "specialist/b": {"a": [0.0, 0.0], "b": [1.0, 1.0]},
            "opd": {"a": [1.0, 1.0], "b": [0.5, 0.5]},
        }
    )
    assert found.headroom["opd"] == {"a": None, "b": 0.5, MACRO: 1.0}
    assert found.headroom_intervals["opd"]["a"] is None


def test_differences_are_paired_and_own_domain_where_there_is_one_per_domain() -> None:
    found = numbers_of(
        {
            "base": {"a": [0.0, 1.0], "b": [0.0, 0.0]},
            "sft/a": {"a": [0.2, 0.8], "b": [0.9, 0.9]},
            "sft/b": {"a": [0.9, 0.9], "b": [0.1, 0.1]},
            "specialist/a": {"a": [0.4, 1.0], "b": [0.0, 0.0]},
            "specialist/b": {"a": [0.0, 0.0], "b": [0.5, 0.5]},
        }
    ).differences
    # a: both prompts are 0.2 better, whatever the prompts' own spread; b: 0.4 better.
    assert found["specialist-sft"]["a"] == {"difference": 0.2, "low": 0.2, "high": 0.2}
    assert found["specialist-sft"]["b"] == {"difference": 0.4, "low": 0.4, "high": 0.4}
    assert found["specialist-sft"][MACRO] == {"difference": 0.3, "low": 0.3, "high": 0.3}
    assert "opd-ties" not in found


def test_a_teacher_by_path_can_be_the_oracle() -> None:
    scores = {
        "base": {"a": [0.0, 0.5]},
        "specialist/a": {"a": [0.5, 0.5]},
        "teacher": {"a": [1.0, 1.0]},
    }
    assert numbers_of(scores, a="teacher").checkpoints["oracle"]["a"]["score"] == 1.0


def test_different_prompts_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    scores = json.loads((inputs["evaluate/opd"] / "scores.json").read_text())
    scores["domains"]["code"]["prompt_ids"][3] = "another"
    write_json(tmp_path / "opd" / "scores.json", scores)
    write_json(tmp_path / "opd" / "done.json", {"seconds": 1.0})
    with pytest.raises(DataError, match=r"'base' and 'opd' .* domain 'code'"):
        make_report(tmp_path / "out", {**inputs, "evaluate/opd": tmp_path / "opd"})


def test_a_missing_file_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    tmp_path.joinpath("ties").mkdir()
    with pytest.raises(DataError, match=r"ties/scores\.json cannot be read"):
        make_report(tmp_path / "out", {**inputs, "evaluate/ties": tmp_path / "ties"})


def test_the_same_run_gives_the_same_bytes(
    inputs: dict[str, Path], made: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    make_report(tmp_path, inputs)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == made[1]


def test_the_verdict_says_what_the_figures_say(made: tuple[dict[str, Any], str]) -> None:
    facts, page = made
    captured = percent(facts["headroom"]["opd"][MACRO])
    assert facts["verdict"].startswith(f"OPD captures {captured}")
    assert "It beats TIES by" in facts["verdict"]
    assert captured in page


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ([1.0] * 20, "It beats TIES"),
        ([0.5, 0.7] * 10, "cannot be told from"),
        ([0.1] * 20, "stays behind"),
    ],
)
def test_the_verdict_knows_ahead_level_and_behind(student: list[float], words: str) -> None:
    found = numbers_of(
        {
            "base": {"a": [0.0] * 20},
            "specialist/a": {"a": [1.0] * 20},
            "ties": {"a": [0.6, 0.6] * 10},
            "opd": {"a": student},
        }
    )
    assert words in " ".join(verdict(found, ["a"]))


def test_a_distillation_that_ended_early_is_told_and_one_that_did_not_is_not() -> None:
    ended = [{"step": 36, "total": 80}, {"step": 37, "total": 80, "stopped": 1}]
    whole = [{"step": 80, "total": 80, "stopped": 1}]  # flat in its last step
    assert early_stops({"opd": ended, "opd/jsd": whole, "base": []}) == [
        "OPD stopped after 37 of 80 steps, where every domain's KL was flat."
    ]


def test_the_verdict_claims_no_share_of_a_lead_within_noise() -> None:
    found = numbers_of(
        {
            "base": {"a": [0.0, 1.0] * 10},
            "specialist/a": {"a": [1.0, 0.0] * 9 + [1.0, 1.0]},  # 0.05 ahead, of prompts at random
            "ties": {"a": [1.0, 1.0] * 10},
            "opd": {"a": [0.0, 0.0] * 10},
        }
    )
    assert found.headroom["opd"][MACRO] == -10.0
    said = " ".join(verdict(found, ["a"]))
    assert "(0.55 against 0.50) cannot be told from noise" in said
    assert "OPD scores 0.00. It stays behind TIES" in said
    assert "%" not in said


def test_a_run_of_nothing_but_a_base_has_a_report(inputs: dict[str, Path], tmp_path: Path) -> None:
    facts = make_report(tmp_path, {"evaluate/base": inputs["evaluate/base"]})
    assert facts["headroom"]["base"][MACRO] is None
    assert (tmp_path / "report.html").exists()


class Page(HTMLParser):
    """Collects what a page would fetch or run, and whether its tags close."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [v or "" for k, v in attrs if k in {"src", "href", "srcset", "data"}]
        self.scripts += tag == "script" or any(k.startswith("on") for k, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs  # closes itself

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_nothing_a_model_wrote_becomes_markup(
    made: tuple[dict[str, Any], str],
) -> None:
    page = Page()
    page.feed(made[1])
    assert page.open == []
    assert page.scripts == 0
    assert [url for url in page.fetched if not url.startswith("data:")] == []
    assert re.findall(r"url\(|@import|https?://", made[1]) == []


def test_the_page_is_light(made: tuple[dict[str, Any], str]) -> None:
    assert len(made[1].encode()) < 400_000


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3.0, 17.0, 4) == [5.0, 10.0, 15.0]
    assert log_ticks(0.02, 1.5) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert log_ticks(1e-4, 5.0) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0])


def test_a_running_mean_keeps_a_constant_and_averages_its_window() -> None:
    assert running_mean([2.0] * 5, 3) == [2.0] * 5
    assert running_mean([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]


def test_figures_are_spelled_without_a_negative_zero() -> None:
    assert (signed(0.061), signed(-0.061), signed(-0.001)) == ("+0.06", "−0.06", "0.00")
    assert (percent(0.97), percent(-0.001), percent(None)) == ("97%", "0%", "–")


def test_scores_of_distillation_and_its_ablations_are_drawn_over_tokens(
    inputs: dict[str, Path],
) -> None:
    panels, legend = score_curves(read_run(inputs), DOMAINS)
    assert [panel.title for panel in panels] == [MACRO, *DOMAINS]
    assert legend == [("OPD", 1), ("forward_kl", 2)]
    for panel in panels:
        assert 'class="line c1"' in panel.chart
        assert 'class="line c2"' in panel.chart
    bare = {role: path for role, path in inputs.items() if not role.startswith("metrics/opd")}
    assert score_curves(read_run(bare), DOMAINS)[0] == []


def test_scores_that_no_judge_could_give_are_left_out_of_their_curves(
    inputs: dict[str, Path],
) -> None:
    run, whole = read_run(inputs), score_curves(read_run(inputs), DOMAINS)[0]
    scored = [r for records in run.records.values() for r in records if "score/code" in r]
    for record in scored:
        record["score/code"] = None
    next(record for record in run.records["opd"] if record in scored)["score/agent"] = None
    panels = score_curves(run, DOMAINS)[0]
    assert [panel.title for panel in panels] == [MACRO, "mathematics", "agent", "instructions"]
    same = {panel.title: panel.chart for panel in whole}
    assert [panel.chart == same[panel.title] for panel in panels] == [True, True, False, True]


def test_the_terms_of_a_reward_are_drawn_where_there_are_several(inputs: dict[str, Path]) -> None:
    run = read_run(inputs)
    for i, record in enumerate(run.records["grpo/code"]):
        record |= {"term/programs": i / 50, "term/formats": 1 - i / 50}
    for record in run.records["grpo/agent"]:
        record["term/tools"] = record["reward"]
    panels, legend = term_curves(run, ["grpo/code", "grpo/agent", "grpo/mathematics"])
    assert [panel.title for panel in panels] == ["grpo/code"]
    assert legend == [("formats", 1), ("programs", 2)]
    falls, rises = re.findall(r'class="line c[12]" d="([^"]*)"', panels[0].chart)
    heights = [[float(y) for y in re.findall(r",([\d.]+)", line)] for line in (falls, rises)]
    assert heights[0] == sorted(heights[0])  # downwards on the page
    assert heights[1] == sorted(heights[1], reverse=True)
    page = [section["heading"] for section in curves(run, DOMAINS)]
    assert "Terms of the reward" in page
    assert "Terms of the reward" not in [s["heading"] for s in curves(read_run(inputs), DOMAINS)]


def test_ablations_are_compared_with_distillation(made: tuple[dict[str, Any], str]) -> None:
    facts, page = made
    points = {
        name: facts["checkpoints"][name][MACRO]["score"] for name in ("opd", "opd/forward_kl")
    }
    found = facts["differences"]["opd-opd/forward_kl"][MACRO]["difference"]
    assert found == pytest.approx(points["opd"] - points["opd/forward_kl"], abs=1e-5)
    assert "OPD over forward_kl" in page
    assert "Other ways to distil" in page
