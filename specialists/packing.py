"""Documents of one step laid end to end in a few rows without padding: same loss, same gradients.

Packing moves documents between a step's microbatches and never between steps, so that steps, their
rows and their order are those of training without it. The model has to keep the documents apart by
their restarting positions, as V4 does; of other models that is found out before training.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.utils.generic import is_flash_attention_requested
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.backbone import V4ForCausalLM
from posttrain.errors import CheckpointError

TRIED = ((5, 6, 7), (8, 9, 10, 11, 12))
"""Two documents for a model to read packed and alone."""

TOLERANCE = 1e-4
"""Of the largest logit: rounding is below it, a document that sees another far above."""


def packs(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Places 0 ... len(lengths) - 1 in `count` packs of nearly equal length, none of them empty:
    the longest that is left goes to the shortest. `packs([9, 2, 3, 4], 2)` is [[0], [1, 2, 3]]."""
    found: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = min(range(count), key=lambda i: (sizes[i], len(found[i])))
        found[least].append(place)
        sizes[least] += lengths[place]
    return [sorted(pack) for pack in found]


def packed(rows: Dataset, *, rows_per_step: int, packs_per_step: int) -> Dataset:
    """The rows, as trl's collator takes packs: `seq_lengths` says where documents end."""
    lengths = [len(ids) for ids in rows["input_ids"]]

    def of_steps() -> Iterator[dict[str, list[int]]]:
        for start in range(0, len(lengths), rows_per_step):
            step = rows[start : start + rows_per_step]
            for pack in packs(lengths[start : start + rows_per_step], packs_per_step):
                found = {
                    name: [token for place in pack for token in step[name][place]]
                    for name in ("input_ids", "labels")
                }
                yield {**found, "seq_lengths": [lengths[start + place] for place in pack]}

    return Dataset.from_list(list(of_steps()))


def check_packing(model: Any) -> None:
    """Raises CheckpointError where documents of a pack would see each other.

    V4 finds them itself, and flash attention is told their lengths; any other model reads two short
    documents packed and alone.
    """
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(plain, V4ForCausalLM) or is_flash_attention_requested(plain.config):
        return
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    documents = [[i % plain.config.vocab_size for i in ids] for ids in TRIED]
    with torch.no_grad():
        alone = [_logits(model, collator([{"input_ids": ids}])) for ids in documents]
        together = _logits(model, collator([{"input_ids": ids} for ids in documents]))
    expected = torch.cat(alone, dim=1)
    if (together - expected).abs().max() > TOLERANCE * expected.abs().max():
        raise CheckpointError(
            f"sft.packing is true, and in this {plain.config.model_type} with attention "
            f"{plain.config._attn_implementation!r} packed documents see each other: set packing "
            "to false, or attn_implementation in the base's config.json to one that is told of "
            "documents (sdpa, flash_attention_2)"
        )


def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    batch.pop("labels")
    return model(**batch, use_cache=False).logits
