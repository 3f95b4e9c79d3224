"""GRPO beside TRL's own: `python benchmarks/grpo.py RUN --domain mathematics`.

RUN is a finished run's folder, and the start its SFT checkpoint of the domain; the page keeps what
it has of other domains. The quickstart's prompts and answers are short and of one length. For long
ones, `posttrain run gsm8k --set domains.gsm8k.grpo.num_steps=5`. Both train it with
the recipe's GRPO settings on the same prompts in the same order, the same grader, optimizer and
loss; TRL by `GRPOTrainer` with its own generation on our class, posttrain as its GRPO stage does.
Each in a process of its own, fp32, one thread; times are processor time, and a rollout's is that of
sampling alone. Afterwards both are scored on the domain's held-out prompts, four samples each at
T = 1.

Seeds decide the prompts' order and what is sampled. A score's interval is over prompts, so that
only several seeds tell how far two trainings differ by chance.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import closing
from itertools import accumulate, pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import yaml
from charts import chart
from measured import Json, apart, forget_peak, machine, memory_mib, place, write
from transformers import TrainerCallback, set_seed

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.domains import DomainSpec
from posttrain.intervals import mean_interval
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.pipeline.recipe import Recipe
from posttrain.report_plots import Series
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task, heldout_rows
from specialists import grpo, training
from specialists.config import GrpoStage

PEERS = ("posttrain", "TRL on ours")
NUM_SAMPLES = 4
ALONG = {"thousand own tokens": "own_tokens", "processor seconds": "seconds"}
"""What a reward is drawn over, and where its numbers are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--domain", default="mathematics")
    parser.add_argument("--page", type=Path, default=Path("docs/grpo-speed.md"))
    parser.add_argument("--steps", type=int, help="steps of each; the recipe's by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--first", type=int, default=0, help="go on from this seed: the page has those before it"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        peer, out, seed = arguments.worker
        config, start = stage_of(arguments.run, arguments.domain, arguments.steps)
        found = measure(peer, config, start, Path(out), arguments.run, seed=int(seed))
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    numbers = arguments.page.with_suffix(".json")
    older: Json = json.loads(numbers.read_text("utf-8")) if numbers.exists() else {}
    before = older.get("domains", {}).get(arguments.domain, {}).get("rows", [])
    kept = [row for row in before if row["seed"] < arguments.first]
    found: Json = {"date": machine()["date"], "load": machine()["load"], "rows": kept}
    domains = {**older.get("domains", {}), arguments.domain: found}
    data: Json = {**machine("torch", "transformers", "trl"), "domains": domains}
    for seed, peer in product(range(arguments.first, arguments.seeds), PEERS):
        sys.stderr.write(f"seed {seed}, {peer} ...\n")
        with tempfile.TemporaryDirectory() as out:
            found["rows"].append(apart("--worker", peer, out, str(seed)))
        write(arguments.page, data, page)
        for along in ALONG:
            path = arguments.page.with_name(f"grpo-{arguments.domain}-{along.split()[-1]}.svg")
            path.write_text(picture(found["rows"], along), encoding="utf-8")


def measure(peer: str, config: GrpoStage, start: Path, out: Path, run: Path, *, seed: int) -> Json:
    """A row of the table."""
    (spec,) = config.domains
    tokenizer: Any = load_tokenizer(start)
    model: Any = load_model(start)
    metrics = Metrics(out / "metrics.jsonl", stage="grpo")
    job = Job(out, {"start": start.parent}, run, seed=seed, num_threads=1, metrics=metrics)
    set_seed(seed)
    clock = Clock()
    with closing(Task(spec, tokenizer, folder=run, seed=0)) as task:
        visits = grpo.prompt_order([task], config.grpo, seed=seed)
        asked = task.requests([row for _, row in visits])
        if peer == PEERS[0]:
            trainer: Any = ours(model, tokenizer, task, visits, config, job, clock)
        else:
            trainer = trls(model, tokenizer, task, visits, config, job, clock)
        trainer.add_callback(clock)
        base = memory_mib("VmRSS")
        forget_peak()
        with training.known_warnings():
            trainer.train()
        peak = memory_mib("VmHWM") - base
        score = scored(model, task, spec)
    seconds = [after - before for before, after in pairwise(clock.ends)]
    count = min(len(clock.rewards), len(clock.ends))
    return {
        "own_tokens": [total / 1e3 for total in accumulate(clock.tokens[:count])],
        "seconds": [end - clock.start for end in clock.ends[:count]],
        "peer": peer,
        "seed": seed,
        "steps": len(seconds) + 1,
        "rows": config.grpo.rows_per_step,
        "step_s": fmean(seconds),
        "rollout_s": fmean(clock.sampling[1:]),
        "prompt_tokens": fmean(len(request.prompt) for request in asked),
        "tokens": sum(clock.tokens),
        "tokens_per_s": sum(clock.tokens[1:]) / sum(clock.sampling[1:]),
        "peak_mib": peak,
        "rewards": clock.rewards,
        "score": score,
    }


def stage_of(run: Path, domain: str, num_steps: int | None) -> tuple[GrpoStage, Path]:
    """The recipe's GRPO of a domain, and the SFT checkpoint that it starts from."""
    recipe = Recipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text("utf-8")))
    found = recipe.specialists()[domain]
    if found.grpo is None:
        sys.exit(f"{run}'s recipe has no grpo for {domain}")
    settings = found.grpo
    if num_steps:
        settings = settings.model_copy(update={"num_steps": num_steps})
    (start,) = (run / "stages").glob(f"sft.{domain}-*")
    return GrpoStage(domains=[found.spec], grpo=settings), start / "checkpoint"


class Clock(TrainerCallback):
    """Processor time at the end of each step, and of each step's sampling."""

    def __init__(self) -> None:
        self.start = 0.0
        self.ends: list[float] = []
        self.sampling: list[float] = []
        self.tokens: list[int] = []
        self.rewards: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())


def ours(
    model: Any, tokenizer: Any, task: Task, visits: Any, config: GrpoStage, job: Job, clock: Clock
) -> Any:
    class Timed(grpo.GroupSampler):
        def sample(self, visits: Any, attempt: int = 0) -> list[list[Rollout]]:
            start = time.process_time()
            found = super().sample(visits, attempt)
            clock.sampling.append(time.process_time() - start)
            clock.tokens.append(sum(sum(r.is_own) for group in found for r in group))
            return found

        def score(self, visits: Any, groups: Any) -> Any:
            found = super().score(visits, groups)
            clock.rewards.append(fmean(score.reward for group in found for score in group))
            return found

    engine = Engine(model, num_slots=config.grpo.num_slots, seed=job.seed)
    sampler = Timed(engine, [task], visits, config=config.grpo, seed=job.seed)
    return grpo.build_trainer(model, tokenizer, sampler, config, job)


def trls(
    model: Any, tokenizer: Any, task: Task, visits: Any, config: GrpoStage, job: Job, clock: Clock
) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = [row for _, row in visits]
    prompts = [request.prompt for row in rows for request in task.requests([row])]
    texts = [tokenizer.decode(ids) for ids in prompts]
    again = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if again != prompts:
        sys.exit("TRL's text of the prompts does not give the same tokens")

    def reward(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        rollouts = [
            Rollout(
                rows[i].id, task.name, 0, prompts[i], ids, [True] * len(ids), [0.0] * len(ids),
                finish_reason="stop" if ids[-1] == tokenizer.eos_token_id else "length",
            )
            for i, ids in zip(number, completion_ids, strict=True)
        ]  # fmt: skip
        found = [score.reward for score in task.score(rollouts)]
        clock.rewards.append(fmean(found))
        return found

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *given: Any, **options: Any) -> Any:
            start = time.process_time()
            found = super()._generate_single_turn(*given, **options)
            clock.sampling.append(time.process_time() - start)
            clock.tokens.append(sum(map(len, found[0])))
            return found

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return tokenizer(prompts, add_special_tokens=False)["input_ids"], None, {}

    settings = config.grpo
    return Timed(
        model,
        reward_funcs=reward,  # pyright: ignore[reportArgumentType]
        args=grpo.arguments(config, job),
        train_dataset=Dataset.from_dict({"prompt": texts, "number": list(range(len(texts)))}),
        processing_class=tokenizer,
        optimizers=training.optimizer_for(model, settings.optimizer, num_steps=settings.num_steps),
    )


def scored(model: Any, task: Task, spec: DomainSpec) -> list[float]:
    """Mean, low and high over the held-out prompts."""
    model.eval()
    requests = task.requests(heldout_rows(task, None), num_samples=NUM_SAMPLES)
    with torch.no_grad():
        found = list(Engine(model, num_slots=64, seed=1).run(requests))
    by_prompt: dict[str, list[float]] = {}
    for rollout, score in zip(found, task.score(found), strict=True):
        by_prompt.setdefault(rollout.prompt_id, []).append(score.reward)
    means = [fmean(by_prompt[prompt]) for prompt in sorted(by_prompt)]
    interval = mean_interval(means, num_resamples=2000, seed=0)
    return [fmean(means), interval.low, interval.high]


def picture(rows: list[Json], along: str) -> str:
    """Each training's mean reward, of five steps up to each."""
    lines = [
        Series(
            row["peer"],
            row[ALONG[along]],
            [fmean(row["rewards"][max(0, i - 4) : i + 1]) for i in range(len(row[ALONG[along]]))],
            PEERS.index(row["peer"]) + 1,
        )
        for row in rows
    ]
    return chart(lines, unit="reward", along=along)


def page(data: Json) -> str:
    """docs/grpo-speed.md."""
    lines = [
        "# GRPO beside TRL's own",
        "",
        f"Written by `benchmarks/grpo.py`; {place(data)}.",
        "A specialist's GRPO, from its SFT checkpoint: same prompts, grader, optimizer and loss.",
        "Seconds are processor time a step, the first left out; TRL is `GRPOTrainer` with its own",
        "generation, on our class. Memory is the peak above what the process held before the first",
        "step; the score is of held-out prompts, with its 95% interval.",
    ]
    for name, found in data["domains"].items():
        lines += ["", *section(name, found)]
    return "\n".join(lines) + "\n"


def section(name: str, found: Json) -> list[str]:
    """One domain's table."""
    rows = found["rows"]
    lines = [
        f"## {name}",
        "",
        f"{found['date']}, load {found['load']} at the start.",
        "",
        *(f"![reward over {along}](grpo-{name}-{along.split()[-1]}.svg)" for along in ALONG),
        "",
        "| | seed | steps | prompt tokens | own tokens | s a step | sampling | tokens/s | peak MiB "
        "| score |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, low, high = row["score"]
        lines.append(
            f"| {row['peer']} | {row['seed']} | {row['steps']} x {row['rows']} rows | "
            f"{row['prompt_tokens']:.0f} | {row['tokens']:,} | {row['step_s']:.2f} | "
            f"{row['rollout_s']:.2f} | {row['tokens_per_s']:,.0f} | "
            f"{row['peak_mib']:,.0f} | {mean:.3f} [{low:.3f}, {high:.3f}] |"
        )
    ours, trl = ([row for row in rows if row["peer"] == peer] for peer in PEERS)
    if not trl:
        return lines
    rollout, step = (
        fmean(row[key] for row in trl) / fmean(row[key] for row in ours)
        for key in ("rollout_s", "step_s")
    )
    mean = [fmean(row["score"][0] for row in of_peer) for of_peer in (ours, trl)]
    more = [a["score"][0] - b["score"][0] for a, b in zip(ours, trl, strict=False)]
    error = stdev(more) / len(more) ** 0.5 if len(more) > 1 else math.nan
    lines += [
        "",
        f"Over the seeds sampling is {rollout:.2f} times as fast as TRL's, the step {step:.2f}",
        f"times, and the score {mean[0]:.3f} where TRL's is {mean[1]:.3f}: a difference of",
        f"{fmean(more):+.3f}, with a standard error of {error:.3f}.",
        "",
        "Mean reward, in parts of five steps:",
        "",
    ]
    for row in rows:
        parts = [row["rewards"][i : i + 5] for i in range(0, len(row["rewards"]), 5)]
        means = ", ".join(f"{fmean(part):.2f}" for part in parts)
        lines.append(f"- {row['peer']}, seed {row['seed']}: {means}")
    return lines


if __name__ == "__main__":
    main()
