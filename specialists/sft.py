"""Supervised training on demonstrations, by trl.SFTTrainer on rows that are token ids already.

The loss is the mean cross entropy over the learned tokens of a step, however it is cut into
microbatches or packed. Several domains give the SFT of the `mixed` baseline.
"""

import hashlib
import json
import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from posttrain.checkpoints import load_tokenizer
from posttrain.domains import DomainSpec, Need, overlap
from posttrain.errors import DataError
from posttrain.files import write_atomic
from posttrain.job import Job
from posttrain.tasks import Task
from specialists import training
from specialists.config import (
    Loss,
    SftConfig,
    SftStage,
    SupervisedConfig,
    TuningConfig,
)
from specialists.judge import open_task
from specialists.lora import load_start
from specialists.packing import check_packing, packed
from specialists.rows import TokenRow, draw, sort_within_steps
from specialists.trl_border import OurSFTTrainer
from specialists.validation import BestWeights, TaskScore

IGNORED = -100
"""The label of a token without loss."""

TOO_LONG = "too_long.json"
"""In the stage's folder: the rows that a length limit left out."""

logger = logging.getLogger(__name__)


def work(config: SftStage, job: Job) -> None:
    """Train `start` on its domains' demonstrations; each domain gives as many rows as the others.

    Raises:
        DataError: a domain has no demonstration, or none that fits in the context.
    """
    if not training.prepare(job):
        return
    start = job.inputs["start"] / "checkpoint"
    tokenizer = load_tokenizer(start)
    model, base = load_start(start, config.sft.lora)
    rows = {spec.name: demonstrations(spec, tokenizer, config.sft, job) for spec in config.domains}
    learned, kept = split_validation(rows, config.sft.validation_share)
    sources, weights = by_source(config.domains, learned)
    need = need_of(config.sft)
    with task_score(config.domains, kept, tokenizer, config.sft, job, need=need) as score:
        learn(
            model, tokenizer, sources, config=config.sft, job=job, weights=weights,
            validation=kept, score=score, base=base, facts=overlap.counts(job.out),
        )  # fmt: skip


def by_source(
    domains: Sequence[DomainSpec], rows: dict[str, list[TokenRow]]
) -> tuple[dict[str, list[TokenRow]], list[float]]:
    """The rows by domain and part of its mixture, and the weight of each: a domain's sum to 1.

    Raises:
        DataError: a part has no row.
    """
    sources: dict[str, list[TokenRow]] = {}
    for spec in domains:
        for number, part in enumerate(spec.data.parts):
            found = [row for row in rows[spec.name] if row.source == number]
            if not found:
                raise DataError(
                    f"domain {spec.name!r}: part {number} of its mixture, {part.source}, gave no "
                    "row to learn: give it more, or leave it out"
                )
            sources[f"{spec.name}[{number}]" if spec.data.mixture else spec.name] = found
    return sources, [share for spec in domains for share in spec.data.shares]


@contextmanager
def task_score(
    domains: Sequence[DomainSpec],
    validation: Sequence[TokenRow],
    tokenizer: Any,
    config: TuningConfig,
    job: Job,
    *,
    need: Need | None = None,
) -> Generator[TaskScore | None]:
    """What grades answers to the validation rows' prompts, with its graders; None: nothing does."""
    with ExitStack() as stack:
        tasks = [
            stack.enter_context(closing(open_task(spec, tokenizer, job, need=need)))
            for spec in domains
            if config.score
        ]
        ids = {row.id for row in validation}
        yield TaskScore(tasks, ids, config.score, seed=job.seed) if config.score else None


def split_validation(
    rows: dict[str, list[TokenRow]], share: float
) -> tuple[dict[str, list[TokenRow]], list[TokenRow]]:
    """The rows to learn by domain, and those to validate on. A row's side is its prompt's alone.

    Raises:
        DataError: a domain has none left to learn, or no domain has one to validate on.
    """
    kept = {row.id for found in rows.values() for row in found if _position(row) < share}
    learned = {name: [r for r in found if r.id not in kept] for name, found in rows.items()}
    empty = [name for name, found in learned.items() if not found]
    if empty or (share and not kept):
        raise DataError(
            f"validation_share {share:g} keeps {len(kept)} of {sum(map(len, rows.values()))} "
            f"demonstrations and leaves none to {', '.join(empty) or 'validate on'}: give more "
            "demonstrations, or another share"
        )
    return learned, [row for found in rows.values() for row in found if row.id in kept]


def _position(row: TokenRow) -> float:
    """Where in [0, 1) a prompt stands; otherwise than where it stands in the held-out split."""
    digest = hashlib.sha256(f"validation {row.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def demonstrations(spec: DomainSpec, tokenizer: Any, config: SftConfig, job: Job) -> list[TokenRow]:
    """The first `num_demonstrations` of the domain's train split, in the order of their hashes; of
    streamed data as many as are learned."""
    need = need_of(config)
    with closing(open_task(spec, tokenizer, job, need=need)) as task:
        rows = [row for row in task.train if row.response is not None]
        if not rows:
            raise DataError(
                f"domain {spec.name!r} has sft, but none of its {len(task.train)} train rows has a "
                "response: add responses to its data, or remove its sft"
            )
        chosen = sorted(rows, key=lambda row: row.id)[: config.num_demonstrations]
        return token_rows(task, chosen, config.loss)


def need_of(config: SftConfig) -> Need:
    """The demonstrations of a domain that are learned, and those to validate on."""
    learned = math.ceil(config.num_steps * config.rows_per_step / (1 - config.validation_share))
    return Need(num_train=min(config.num_demonstrations or learned, learned), is_answered=True)


def learn(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: dict[str, list[TokenRow]],
    *,
    config: SupervisedConfig,
    job: Job,
    weights: Sequence[float] | None = None,
    facts: Mapping[str, float] | None = None,
    validation: Sequence[TokenRow] = (),
    score: TaskScore | None = None,
    base: Path | None = None,
) -> None:
    """Train `model` on rows drawn from the sources by weight, and write the result.

    Args:
        model: trained in place.
        tokenizer: saved beside the weights.
        sources: rows by the name of where they come from, for messages.
        config: steps, rows, optimizer.
        job: where to work.
        weights: one per source; null: equal.
        facts: what to log beside the number of rows.
        validation: rows that choose the result; none: the last weights are it.
        score: grades the model's own answers to their prompts; None: their loss alone counts.
        base: what `model` is an adapter of.
    """
    if config.packing:
        check_packing(model)
    context = model.config.max_position_embeddings
    limit = min(config.max_length or context, context)
    kept = {name: fitting(name, rows, limit) for name, rows in sources.items()}
    list_too_long(job.out / TOO_LONG, {**sources, "validation": list(validation)}, limit)
    num_rows = sum(map(len, kept.values()))
    counts = {"rows": num_rows, "rows_too_long": sum(map(len, sources.values())) - num_rows}
    data = in_order(list(kept.values()), config, seed=job.seed, weights=weights)
    counts["tokens"] = sum(label != IGNORED for row in data["labels"] for label in row)
    by_score = isinstance(config, TuningConfig) and config.best_by == "score"
    held = fitting("validation", list(validation), limit) if validation else []
    counts |= {"rows_validation": len(held)} if held else {}
    trainer = build_trainer(model, tokenizer, data, config, job, validation=held)
    training.run(
        trainer,
        job,
        tokenizer,
        facts={**counts, **(facts or {})},
        best=BestWeights(trainer.model, job, score=score, by_score=by_score) if held else None,
        base=base,
    )


def build_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Dataset,
    config: SupervisedConfig,
    job: Job,
    *,
    validation: Sequence[TokenRow] = (),
) -> OurSFTTrainer:
    """A trainer for `data` (`input_ids`, `labels`) in its order, once; packed if so configured."""
    assert isinstance(config, TuningConfig) or not validation
    every = config.validate_every if isinstance(config, TuningConfig) and validation else None
    rows_per_microbatch = config.rows_per_step // config.microbatches
    if config.packing:
        steps = {"rows_per_step": config.rows_per_step, "packs_per_step": config.microbatches}
        data = packed(data, **steps)
    shared = training.shared_arguments(
        job,
        num_steps=config.num_steps,
        rows_per_microbatch=1 if config.packing else rows_per_microbatch,
        microbatches=config.microbatches,
        checkpoint_every=config.checkpoint_every,
        optimizer=config.optimizer,
    )
    return OurSFTTrainer(
        model,
        args=SFTConfig(
            **shared,
            max_length=None,  # no row is cut: those too long were left out
            packing=config.packing,
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokens, in packs or not
            train_sampling_strategy="sequential",
            eval_strategy="steps" if every else "no",
            eval_steps=every,
            per_device_eval_batch_size=rows_per_microbatch,
            router_aux_loss_coef=0.0,
        ),
        train_dataset=data,
        eval_dataset=data_set(validation) if validation else None,
        processing_class=tokenizer,
        optimizers=training.optimizer_for(model, config.optimizer, num_steps=config.num_steps),
    )


def token_rows(task: Task, rows: Sequence[Any], loss: Loss) -> list[TokenRow]:
    """The rows as the task renders them, with the tokens that carry loss marked."""
    examples = task.demonstrations(rows, completion_only=loss == "completion")
    learns_all = loss == "all"
    return [
        TokenRow(row.id, tokens, [learns_all or own for own in is_own], row.source)
        for row, (tokens, is_own) in zip(rows, examples, strict=True)
    ]


def fitting(name: str, rows: list[TokenRow], limit: int) -> list[TokenRow]:
    """The rows of at most `limit` tokens; how many are longer is logged, and how long."""
    kept = [row for row in rows if len(row.tokens) <= limit]
    if not kept:
        shortest = min((len(row.tokens) for row in rows), default=0)
        raise DataError(
            f"none of the {len(rows)} rows of {name!r} fits in {limit} tokens, the shortest has "
            f"{shortest}: raise max_length up to the model's context, or shorten the rows"
        )
    if len(kept) < len(rows):
        logger.warning(
            "%d of the %d rows of %r are longer than %d tokens, up to %d: left out, listed in %s",
            len(rows) - len(kept), len(rows), name, limit,
            max(len(row.tokens) for row in rows), TOO_LONG,
        )  # fmt: skip
    return kept


def list_too_long(path: Path, sources: Mapping[str, Sequence[TokenRow]], limit: int) -> None:
    """Write the ids (hashes of their prompts) and tokens of the rows that `fitting` leaves out."""
    found = {
        name: [{"id": row.id, "tokens": len(row.tokens)} for row in rows if len(row.tokens) > limit]
        for name, rows in sources.items()
    }
    found = {name: rows for name, rows in found.items() if rows}
    if found:
        write_atomic(path, json.dumps(found, indent=2) + "\n")


def in_order(
    sources: Sequence[list[TokenRow]],
    config: SupervisedConfig,
    *,
    seed: int,
    weights: Sequence[float] | None,
) -> Dataset:
    """Every row of the training, in the order in which it is learned."""
    count = config.num_steps * config.rows_per_step
    drawn = draw([len(rows) for rows in sources], count, seed=seed, weights=weights)
    lengths = [len(sources[source][row].tokens) for source, row in drawn]
    order = sort_within_steps(lengths, config.rows_per_step)
    offsets = [sum(map(len, sources[:i])) for i in range(len(sources))]
    flat = [row for rows in sources for row in rows]
    return data_set(flat).select(
        [offsets[source] + row for source, row in (drawn[p] for p in order)]
    )


def data_set(rows: Sequence[TokenRow]) -> Dataset:
    """As TRL takes rows that are token ids already."""
    return Dataset.from_dict(
        {"input_ids": [row.tokens for row in rows], "labels": [labels(row) for row in rows]}
    )


def labels(row: TokenRow) -> list[int]:
    """The token where it is learned, IGNORED elsewhere and first: nothing is there to predict it
    from, and in a pack it is not learned from the document before. TRL shifts them."""
    pairs = zip(row.tokens[1:], row.is_learned[1:], strict=True)
    return [IGNORED, *(token if is_learned else IGNORED for token, is_learned in pairs)]
