"""The base: a preset trained from nothing on data of mixed quality, or a checkpoint that exists.

No prompt that is held out in any domain is learned here; a check asserts it, and the number of rows
taken out is logged.
"""

from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from posttrain.adapters import copy_adapter, find_base, is_adapter
from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.checkpoints import load_model, load_tokenizer, save_checkpoint
from posttrain.domains import DomainSpec, Need, Row, is_heldout, load_rows, split, stream_rows
from posttrain.errors import CheckpointError, DataError
from posttrain.job import Job
from posttrain.tasks import Task
from posttrain.tokenizer import build_tokenizer
from specialists import training
from specialists.config import ExistingStage, MixtureConfig, PretrainStage
from specialists.rows import TokenRow
from specialists.sft import learn, token_rows

FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a model on the hub."""


def work(config: PretrainStage, job: Job) -> None:
    """Make the tokenizer and the preset's weights, and train them on the mixture.

    Raises:
        DataError: a source has no row left to learn.
    """
    if not training.prepare(job):
        return
    tokenizer = build_tokenizer()
    mixture = config.pretrain.mixture
    most = config.pretrain.num_steps * config.pretrain.rows_per_step
    clean = [without_heldout(source, config.domains, job, most=most) for source in mixture]
    check_disjoint([row for rows, _ in clean for row in rows], config.domains, job)
    sources = {
        f"mixture[{i}]": _tokens(source, rows, tokenizer, config, job)
        for i, (source, (rows, _)) in enumerate(zip(mixture, clean, strict=True))
    }
    learn(
        new_model(config.preset, tokenizer, seed=job.seed),
        tokenizer,
        sources,
        config=config.pretrain,
        job=job,
        weights=[source.weight for source in mixture],
        facts={"rows_heldout": sum(num_dropped for _, num_dropped in clean)},
    )


def new_model(preset: Literal["tiny", "small"], tokenizer: Any, *, seed: int) -> V4ForCausalLM:
    """A V4 with fresh weights for the tokenizer."""
    torch.manual_seed(seed)
    config = preset_config(
        preset,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return V4ForCausalLM(config)


def work_existing(config: ExistingStage, job: Job) -> None:
    """Bring a checkpoint from a folder or the hub into the run, in our layout; an adapter stays
    one, of the base that it names or of `job.inputs["base"]`.

    Raises:
        CheckpointError: there is none, or it cannot be fetched.
    """
    source = job.folder / config.path if config.path else _fetch(str(config.hub), config.revision)
    result = job.out / training.RESULT
    if is_adapter(Path(source)):
        base = job.inputs.get("base")
        copy_adapter(
            Path(source),
            result,
            base=base / training.RESULT if base else find_base(Path(source)),
        )
        return
    model, tokenizer = load_model(source), load_tokenizer(source)
    save_checkpoint(model, tokenizer, result)


def _fetch(model_id: str, revision: str | None) -> str:
    try:
        return snapshot_download(model_id, revision=revision, allow_patterns=FILES)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            f"the hub's {model_id!r} (revision {revision or 'main'}) cannot be fetched: {error}; "
            "correct base.hub and base.revision, or download it and use base.path"
        ) from error


def without_heldout(
    source: MixtureConfig, domains: list[DomainSpec], job: Job, *, most: int | None = None
) -> tuple[list[Row], int]:
    """The source's rows whose prompt no domain holds out, streamed ones up to `most`, and how many
    were taken out."""
    share = max((domain.untrained_share for domain in domains), default=0.0)
    rows = stream_rows(source.data, folder=job.folder, seed=job.seed)
    kept: list[Row] = []
    num_dropped = 0
    for row in (row for row in rows if row.response is not None):
        if is_heldout(row.messages, share):
            num_dropped += 1
            continue
        kept.append(row)
        if source.data.streaming and len(kept) == most:
            break
    if not kept:
        raise DataError(
            f"the mixture's source {source.data.source} has no row to learn: it has {num_dropped} "
            "rows with a response, all of them held out; give it more"
        )
    return kept, num_dropped


def check_disjoint(rows: list[Row], domains: list[DomainSpec], job: Job) -> None:
    """Asserts, on the domains' own splits, that no held-out prompt is among `rows`; those of
    streamed domains are not there to be compared."""
    learned = {row.id for row in rows}
    for domain in (domain for domain in domains if not domain.data.streaming):
        _, heldout = split(
            load_rows(domain.data, folder=job.folder, seed=job.seed), domain.heldout_share
        )
        shared = learned & {row.id for row in heldout}
        assert not shared, f"{len(shared)} held-out prompts of {domain.name!r} are in the mixture"


def rendered_as(source: MixtureConfig, domains: list[DomainSpec]) -> DomainSpec:
    """The domain whose system prompt, tools and effort the source's rows are rendered with."""
    named = [d for d in domains if source.domain in (d.name, d.name.partition("@")[0])]
    plain = {"name": "pretraining", "data": source.data, "reward": "exact"}
    spec = named[0] if named else DomainSpec.model_validate(plain)
    unread = source.data.model_copy(update={"streaming": True})  # the task is there to render
    return spec.model_copy(update={"data": unread, "effort": source.effort or spec.effort})


def _tokens(
    source: MixtureConfig, rows: list[Row], tokenizer: Any, config: PretrainStage, job: Job
) -> list[TokenRow]:
    spec = rendered_as(source, config.domains)
    with closing(Task(spec, tokenizer, folder=job.folder, seed=job.seed, need=Need())) as task:
        return token_rows(task, rows, config.pretrain.loss)
