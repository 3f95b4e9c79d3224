"""The judges of a recipe: the stages and checkpoints they stand on, and what can be wrong with
them. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.adapters import find_base, is_adapter
from posttrain.domains import DomainSpec, Row
from posttrain.errors import DataError
from posttrain.judge_config import ACTOR, JudgeConfig
from posttrain.judge_prompts import judge_messages, judged_field
from posttrain.pipeline.checkpoint_checks import check_model, read_config
from posttrain.pipeline.fingerprints import checkpoint_fingerprint
from posttrain.pipeline.recipe_domain import DomainConfig
from posttrain.transcripts import told

EXTRA_TOKENS = 1024
"""More than a chat format and the words around what is quoted add to a judge's prompt, in bytes."""


def judging_stages(
    specs: Sequence[DomainSpec], specialists: Mapping[str, str], *, has_actor: bool
) -> dict[str, str]:
    """Stages whose checkpoints judge, by the role `judge/<domain>`: a specialist, or the base where
    the actor is asked for and none learns."""
    found: dict[str, str] = {}
    for spec in specs:
        if spec.judge and spec.judge.specialist:
            found[f"judge/{spec.name}"] = specialists[spec.judge.specialist]
        elif spec.judge and spec.judge.checkpoint == ACTOR and not has_actor:
            found[f"judge/{spec.name}"] = "base"
    return found


def judge_fingerprints(specs: Sequence[DomainSpec], folder: Path) -> dict[str, str]:
    """Hashes of the checkpoints in folders that judge; of an adapter, its base's too."""
    found: dict[str, str] = {}
    for spec in specs:
        if spec.judge and spec.judge.folder:
            path = folder / spec.judge.folder
            found[f"judge/{spec.name}"] = checkpoint_fingerprint(path)
            if is_adapter(path):
                found[f"judge/{spec.name}/base"] = checkpoint_fingerprint(find_base(path))
    return found


def judges_first(domains: Mapping[str, DomainConfig]) -> list[str]:
    """The domains' names, those whose specialists judge others in front."""
    judges = {domain.judge.specialist for domain in domains.values() if domain.judge}
    return sorted(domains, key=lambda name: name not in judges)


def check_judge(folder: Path, judge: JudgeConfig) -> None:
    """Raise CheckpointError unless the judge's checkpoint is there, or will be made."""
    if judge.folder:
        check_model(folder / judge.folder, hub=None)


def check_judged_rows(
    domain: DomainConfig,
    rows: Sequence[Row],
    *,
    context: int | None,
    tokenizer: Callable[[], Any],
) -> None:
    """Raise DataError unless every row has what its judge reads, and leaves the judge room for an
    answer and its verdict. `context` and `tokenizer` are the judge's; only what is suspiciously
    long is tokenised."""
    judge = domain.judge
    assert judge
    room = None if context is None else context - domain.max_new_tokens - judge.max_new_tokens
    for number, row in enumerate(rows, start=1):
        fields = domain.reward_fields(row.fields)
        try:
            rubric = judged_field(row, fields, judge.rubric)
            reference = judge.reference and judged_field(row, fields, judge.reference)
        except DataError as error:
            raise DataError(f"row {number} of {len(rows)}: {error}") from None
        messages = _longest(domain, judge, row, rubric, reference)
        length = sum(len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)
        if room is None or length + EXTRA_TOKENS <= room:
            continue
        length = _num_tokens(tokenizer(), messages, judge)
        if length > room:
            raise DataError(
                f"row {number} of {len(rows)}: its judge is asked in {length} tokens, and with an "
                f"answer of {domain.max_new_tokens} (max_new_tokens) and a verdict of "
                f"{judge.max_new_tokens} (judge.max_new_tokens) that does not fit into the judge's "
                f"context of {context}: shorten the row's prompt, rubric or reference, or lower one"
            )


def context_of(folder: Path, judge: JudgeConfig) -> int | None:
    """The context of a judge in a folder; None where its config does not say."""
    assert judge.folder
    path = folder / judge.folder
    config = read_config(find_base(path) if is_adapter(path) else path)
    found = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _longest(
    domain: DomainConfig, judge: JudgeConfig, row: Row, rubric: str, reference: str | None
) -> list[dict[str, Any]]:
    """What the judge is asked about an empty answer."""
    system = [{"role": "system", "content": domain.system}] if domain.system else []
    return judge_messages(
        judge,
        prompt=told([*system, *row.messages]),
        rubric=rubric,
        answers=["", str(reference)] if judge.pairs else [""],
        reference=None if judge.pairs else reference,
    )


def _num_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], judge: JudgeConfig) -> int:
    from posttrain.chat import encode_prompt

    return len(encode_prompt(tokenizer, messages, effort=judge.effort))
