"""Rough costs of a stage before it runs: tokens from its config, seconds from measured rates.

The rates are those of the `tiny` preset on one core; a larger model is slower in proportion to its
parameters. What a run directory has seen of a stage tells more than any of this and is used first.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from distill.config import OpdStage
from posttrain.adapters import find_base, is_adapter
from posttrain.config import Config
from posttrain.domains import DomainSpec
from posttrain.evaluate_config import EvaluateStage
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.stages import Stage
from specialists.config import (
    BestOfStage,
    ExistingStage,
    GrpoStage,
    PretrainStage,
    SftStage,
    TuningConfig,
)

PARAMETERS = {"tiny": 1.1e6, "small": 25e6}

BYTES_PER_PARAMETER = 4
"""fp32, as every stage on a CPU computes and saves."""

PROMPT_TOKENS = 48
"""A prompt's length where nobody has tokenised it yet."""

JUDGE_TOKENS = 512
"""What a judge is asked, where nobody has tokenised it yet."""

RESPONSE_SHARE = 0.5
"""A response's length as a share of max_new_tokens."""

TRAINED_PER_S = 6000.0
SAMPLED_PER_S = 4000.0
SCORED_PER_S = 20000.0
"""Tokens a second and core, at `tiny`'s size: forward and backward, decoding, forward alone."""

THREAD_GAIN = 0.25
"""Two threads are 1.2 times as fast as one on matrices as small as `tiny`'s."""

OVERHEAD_S = 2.0
"""Loading data and a checkpoint, and saving one."""

HELD_OUT_PROMPTS = 128
TRAIN_PROMPTS = 1024
"""Held-out prompts of a domain, and those to train on, where the recipe sets no limit."""


@dataclass(frozen=True)
class Cost:
    """What a stage takes: `Cost(trained=120_000, sampled=60_000)`, in tokens."""

    trained: float = 0.0
    sampled: float = 0.0
    scored: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that pass through a model; a sampled token that is then learned counts twice."""
        return round(self.trained + self.sampled + self.scored)

    def seconds(self, parameters: float, num_threads: int) -> float:
        """Estimated seconds of work."""
        slower = max(parameters / PARAMETERS["tiny"], 1.0) / num_threads**THREAD_GAIN
        return OVERHEAD_S + slower * (
            self.trained / TRAINED_PER_S + self.sampled / SAMPLED_PER_S + self.scored / SCORED_PER_S
        )


def cost_of(config: Config) -> Cost:
    """A stage's tokens, from its config."""
    if isinstance(config, PretrainStage):
        rows = config.pretrain.num_steps * config.pretrain.rows_per_step
        return Cost(trained=rows * _row_tokens(config.domains))
    if isinstance(config, SftStage):
        rows, specs = config.sft.num_steps * config.sft.rows_per_step, config.domains
        answers = len(specs) * _validation_answers(config.sft)
        asked, said = _judge_tokens(specs)
        sampled = answers * (_response_tokens(specs) + said)
        return Cost(trained=rows * _row_tokens(specs), sampled=sampled, scored=answers * asked)
    if isinstance(config, BestOfStage):
        best_of, specs = config.best_of, [config.domain]
        answers = (best_of.num_prompts or TRAIN_PROMPTS) * best_of.samples_per_prompt
        answers += _validation_answers(best_of)
        rows = best_of.num_steps * best_of.rows_per_step
        asked, said = _judge_tokens(specs)
        sampled = answers * (_response_tokens(specs) + said)
        return Cost(trained=rows * _row_tokens(specs), sampled=sampled, scored=answers * asked)
    if isinstance(config, GrpoStage):
        rows = config.grpo.num_steps * config.grpo.rows_per_step
        sampled, row = _response_tokens(config.domains), _row_tokens(config.domains)
        asked, said = _judge_tokens(config.domains)
        return Cost(trained=rows * row, sampled=rows * (sampled + said), scored=rows * asked)
    if isinstance(config, OpdStage):
        how = config.distill
        rows = how.num_steps * how.prompts_per_step
        answers = len(config.domains) * how.evaluate_prompts * how.evaluate_samples
        answers *= 1 + math.ceil(how.num_steps / how.evaluate_every) if how.evaluate_every else 0
        sampled, row = _response_tokens(config.domains), _row_tokens(config.domains)
        asked, said = _judge_tokens(config.domains)
        return Cost(
            trained=rows * row,
            sampled=(rows + answers) * sampled + answers * said,
            scored=rows * row + answers * asked,
        )
    if isinstance(config, EvaluateStage):
        how = config.evaluate
        answers = how.samples_per_prompt + int(how.greedy)
        prompts = len(config.domains) * (how.num_prompts or HELD_OUT_PROMPTS)
        asked, said = _judge_tokens(config.domains)
        sampled = _response_tokens(config.domains) + said
        return Cost(sampled=prompts * answers * sampled, scored=prompts * answers * asked)
    return Cost()


def _validation_answers(config: TuningConfig) -> int:
    """Answers of a domain that are graded while it is trained."""
    if config.score is None:
        return 0
    prompts = config.score.num_prompts or HELD_OUT_PROMPTS
    return (
        prompts
        * config.score.samples_per_prompt
        * math.ceil(config.num_steps / config.validate_every)
    )


def num_parameters(stages: list[Stage], folder: Path) -> float:
    """The base's parameters; for a checkpoint on disk by its size, 0 where nothing is known."""
    config = next(stage.config for stage in stages if stage.name == "base")
    if isinstance(config, PretrainStage):
        return PARAMETERS[config.preset]
    if isinstance(config, ExistingStage) and config.path:
        return _in_folder(folder / config.path)
    return 0.0


def num_judge_parameters(recipe: Recipe, stages: list[Stage], folder: Path) -> float:
    """Those of the largest judge: a folder's, or the base's, as a specialist has."""
    judges = [domain.judge for domain in recipe.domains.values() if domain.judge]
    base = num_parameters(stages, folder) if judges else 0.0
    sizes = [_in_folder(folder / judge.folder) if judge.folder else base for judge in judges]
    return max(sizes, default=0.0)


def _in_folder(place: Path) -> float:
    """A checkpoint's parameters by its size; of an adapter its base's."""
    files = (find_base(place) if is_adapter(place) else place).glob("*.safetensors")
    return sum(file.stat().st_size for file in files) / BYTES_PER_PARAMETER


def estimated_seconds(stages: list[Stage], folder: Path, directory: Path) -> dict[str, float]:
    """Seconds of work for each stage: what the run directory saw of it last, or a rough guess."""
    seen = _seen(directory)
    parameters = num_parameters(stages, folder)
    return {
        stage.name: seen.get(stage.name)
        or cost_of(stage.config).seconds(parameters, stage.num_threads)
        for stage in stages
    }


def _seen(directory: Path) -> dict[str, float]:
    """Seconds of the newest finished attempt of each stage, under any key."""
    paths = (directory / "stages").glob("*/done.json")
    records = [json.loads(p.read_text()) for p in sorted(paths, key=lambda p: p.stat().st_mtime)]
    return {record["stage"]: float(record["seconds"]) for record in records}


def _response_tokens(specs: list[DomainSpec]) -> float:
    return RESPONSE_SHARE * sum(spec.max_new_tokens for spec in specs) / max(len(specs), 1)


def _judge_tokens(specs: list[DomainSpec]) -> tuple[float, float]:
    """What judges read and say about an answer, over all domains."""
    judges = [spec.judge for spec in specs if spec.judge]
    num_texts = [judge.votes * (2 if judge.pairs else 1) for judge in judges]
    said = sum(
        RESPONSE_SHARE * j.max_new_tokens * n for j, n in zip(judges, num_texts, strict=True)
    )
    asked = sum(JUDGE_TOKENS * (2 if judge.pairs else 1) for judge in judges)  # votes read it once
    return asked / max(len(specs), 1), said / max(len(specs), 1)


def _row_tokens(specs: list[DomainSpec]) -> float:
    return PROMPT_TOKENS + _response_tokens(specs)
