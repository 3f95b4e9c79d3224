"""Packing changes no number: loss, gradients, steps and rows are those of rows padded apart."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from stage_runs import GradientCopy, check_killed, trained
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.metrics import Metrics
from specialists import sft, training
from specialists.config import LoraConfig, SftConfig, SftStage
from specialists.lora import load_start
from specialists.packing import check_packing, packed, packs
from specialists.rows import TokenRow

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, max_grad_norm=1e6)
LENGTHS = (70, 3, 2, 9, 17, 5, 4, 8, 2, 30, 3, 6)
"""Two steps of six; the first document alone outweighs the other five of its step."""


def rows_of(num_tokens: int, *, learns_all: bool, seed: int = 0) -> list[TokenRow]:
    rng = Random(seed)
    return [
        TokenRow(
            str(i),
            [rng.randrange(5, num_tokens) for _ in range(length)],
            [learns_all or (rng.random() < 0.5 and place > 0) for place in range(length)],
        )
        for i, length in enumerate(LENGTHS)
    ]


def taught(
    model: Any, tokenizer: Any, rows: list[TokenRow], job: Job, *, at_once: int, packing: bool
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What two steps log, and the gradient of the second."""
    config = SftConfig(
        num_steps=2, rows_per_step=6, rows_per_microbatch=at_once, packing=packing,
        optimizer=OPTIMIZER,
    )  # fmt: skip
    trainer = sft.build_trainer(model, tokenizer, sft.data_set(rows), config, job)
    copy = GradientCopy()
    trainer.add_callback(copy)
    training.run(trainer, job, tokenizer)
    return trained(job), copy.gradient


def check_same(found: Any, expected: Any) -> None:
    for mine, theirs in zip(found[0], expected[0], strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name
        )


@pytest.mark.parametrize("at_once", [6, 3, 1])
@pytest.mark.parametrize("learns_all", [False, True])
def test_packed_rows_teach_what_padded_ones_do(
    start: Path, tokenizer: Any, new_job: NewJob, at_once: int, learns_all: bool
) -> None:
    rows = rows_of(len(tokenizer), learns_all=learns_all)
    found = [
        taught(
            load_model(start / "checkpoint"), tokenizer, rows, new_job(f"packing-{packing}"),
            at_once=at_once, packing=packing,
        )
        for packing in (True, False)
    ]  # fmt: skip
    check_same(*found)


def test_an_adapter_learns_the_same_from_packs(
    start: Path, tokenizer: Any, new_job: NewJob
) -> None:
    rows = rows_of(len(tokenizer), learns_all=False)
    found: list[Any] = []
    for packing in (True, False):
        torch.manual_seed(0)
        model, _ = load_start(start / "checkpoint", LoraConfig(rank=2))
        job = new_job(f"packing-{packing}")
        found.append(taught(model, tokenizer, rows, job, at_once=3, packing=packing))
    check_same(*found)


def test_the_first_token_of_a_document_is_learned_from_nothing(
    start: Path, tokenizer: Any, new_job: NewJob
) -> None:
    rows = rows_of(len(tokenizer), learns_all=True)[:6]
    model: Any = load_model(start / "checkpoint")
    logps = [
        model(torch.tensor([row.tokens])).logits[0, :-1].log_softmax(-1)[i, token]
        for row in rows
        for i, token in enumerate(row.tokens[1:])
    ]
    expected = -torch.stack(logps).mean().item()
    records, _ = taught(model, tokenizer, rows * 2, new_job("packed"), at_once=6, packing=True)
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_is_in_one_pack_and_none_is_longer_than_it_must_be(count: int) -> None:
    rng = Random(count)
    for _ in range(50):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(count, 20))]
        found = packs(lengths, count)
        assert sorted(place for pack in found for place in pack) == list(range(len(lengths)))
        sizes = [sum(lengths[place] for place in pack) for pack in found]
        assert min(sizes) > 0
        # Graham's bound for any rule that fills the shortest
        assert max(sizes) <= sum(lengths) / count + (1 - 1 / count) * max(lengths)
    assert packs([70, 3, 2, 9, 17, 5], 2) == [[0], [1, 2, 3, 4, 5]]


def test_a_step_has_the_same_rows_whether_they_are_packed_or_not(
    tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    config = SftConfig(num_steps=5, rows_per_step=8, rows_per_microbatch=2)
    other = words.model_copy(update={"name": "other"})
    rows = [sft.demonstrations(spec, tokenizer, config, new_job("sft")) for spec in (words, other)]
    data = sft.in_order(rows, config, seed=0, weights=[3.0, 1.0])
    together = packed(data, rows_per_step=8, packs_per_step=4)
    for step in range(5):
        alone = data[8 * step : 8 * step + 8]
        expected = Counter(
            (tuple(ids), tuple(labels))
            for ids, labels in zip(alone["input_ids"], alone["labels"], strict=True)
        )
        found: Counter[Any] = Counter()
        for number in range(4 * step, 4 * step + 4):
            pack, at = together[number], 0
            for length in pack["seq_lengths"]:
                part = slice(at, at + length)
                found[tuple(pack["input_ids"][part]), tuple(pack["labels"][part])] += 1
                at += length
            assert at == len(pack["input_ids"]) == len(pack["labels"])
        assert found == expected


def test_a_packed_run_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
) -> None:
    config = SftConfig(
        num_steps=6, rows_per_step=6, rows_per_microbatch=2, packing=True, checkpoint_every=2,
        optimizer=OPTIMIZER,
    )  # fmt: skip
    stage = SftStage(domains=[words], sft=config)
    check_killed(partial(sft.work, stage), new_job, cut_after, start=start, last=5)


def test_the_validation_loss_is_that_of_padded_rows(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    losses: list[list[float]] = []
    for packing in (True, False):
        config = SftConfig(
            num_steps=2, rows_per_step=6, rows_per_microbatch=3, packing=packing,
            validation_share=0.2, validate_every=1, optimizer=OPTIMIZER,
        )  # fmt: skip
        job = new_job(f"packing-{packing}", {"start": start})
        sft.work(SftStage(domains=[words], sft=config), job)
        losses.append(
            [r["validation_loss"] for r in job.metrics.records() if "validation_loss" in r]
        )
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def small_llama(tokenizer: Any) -> Any:
    torch.manual_seed(2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


def test_another_model_whose_attention_hears_of_documents_learns_the_same(
    tokenizer: Any, new_job: NewJob
) -> None:
    rows = rows_of(len(tokenizer), learns_all=False)
    found: list[Any] = []
    for packing in (True, False):
        model, job = small_llama(tokenizer), new_job(f"packing-{packing}")
        check_packing(model)
        found.append(taught(model, tokenizer, rows, job, at_once=3, packing=packing))
    check_same(*found)


def only_causal(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """An attention of a user's own, which looks at no mask and no lengths."""
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return found.transpose(1, 2).contiguous(), None


def test_packing_is_refused_where_documents_would_see_each_other(
    tokenizer: Any, new_job: NewJob
) -> None:
    AttentionInterface.register("only_causal", only_causal)
    model = small_llama(tokenizer)
    model.set_attn_implementation("only_causal")
    config = SftConfig(num_steps=1, rows_per_step=6, packing=True)
    rows = {"words": rows_of(len(tokenizer), learns_all=False)}
    job = new_job("refused")
    message = r"sft\.packing is true, and in this llama with attention 'only_causal' packed"
    with pytest.raises(CheckpointError, match=message):
        sft.learn(model, tokenizer, rows, config=config, job=job)
    assert not job.out.exists() or not list(job.out.iterdir())
