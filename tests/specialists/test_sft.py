import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import check_killed, trained

from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.config import OptimizerConfig
from posttrain.domains import DataConfig, DomainSpec
from posttrain.errors import DataError
from posttrain.job import Job
from posttrain.metrics import Metrics
from specialists import sft, training
from specialists.config import SftConfig, SftStage
from specialists.rows import TokenRow

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, schedule="cosine")


def stage(domain: DomainSpec, **settings: Any) -> SftStage:
    defaults = {"num_steps": 6, "rows_per_step": 4, "optimizer": OPTIMIZER}
    return SftStage(domains=[domain], sft=SftConfig.model_validate({**defaults, **settings}))


def mean_loss(model: Any, rows: list[TokenRow]) -> float:
    """Cross entropy by the definition, row by row: token t is predicted at t - 1."""
    losses: list[torch.Tensor] = []
    for row in rows:
        logp = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        for t, (token, is_learned) in enumerate(zip(row.tokens, row.is_learned, strict=True)):
            if is_learned:
                losses.append(-logp[t - 1, token])
    return torch.stack(losses).mean().item()


def test_the_first_loss_is_the_mean_over_the_learned_tokens(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft", {"start": start})
    config = stage(words, num_steps=1, num_demonstrations=4)
    rows = sft.demonstrations(words, tokenizer, config.sft, job)
    assert all(sum(row.is_learned) < len(row.tokens) for row in rows)  # prompts are not learned
    expected = mean_loss(load_model(start / "checkpoint"), rows)
    sft.work(config, job)
    assert trained(job)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert job.metrics.records()[0]["tokens"] == sum(sum(row.is_learned) for row in rows)


@pytest.mark.parametrize(
    ("loss", "learned"),
    [
        ("assistant", ["b<end>", "d<end>"]),
        ("completion", ["d<end>"]),
        ("all", ["<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>b<end><｜User｜>c"
                 "<｜Assistant｜></think>d<end>"]),
    ],
)  # fmt: skip
def test_the_loss_says_which_turns_are_learned(
    tokenizer: Any, words: DomainSpec, new_job: NewJob, loss: Any, learned: list[str]
) -> None:
    job = new_job("sft")
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (job.folder / "talk.jsonl").write_text(json.dumps(row) + "\n")
    spec = words.model_copy(update={"data": DataConfig(jsonl="talk.jsonl"), "heldout_share": 1e-9})
    (found,) = sft.demonstrations(spec, tokenizer, SftConfig(loss=loss), job)
    pairs = groupby(zip(found.tokens, found.is_learned, strict=True), key=lambda pair: pair[1])
    texts = [tokenizer.decode([t for t, _ in part]) for is_learned, part in pairs if is_learned]
    assert [text.replace(tokenizer.eos_token, "<end>") for text in texts] == learned


def test_microbatches_change_no_number(start: Path, words: DomainSpec, new_job: NewJob) -> None:
    whole, parts = new_job("whole", {"start": start}), new_job("parts", {"start": start})
    sft.work(stage(words, num_steps=1), whole)
    sft.work(stage(words, num_steps=1, rows_per_microbatch=1), parts)
    for name in ("loss", "grad_norm"):
        assert trained(parts)[0][name] == pytest.approx(trained(whole)[0][name], rel=1e-5)


def test_no_heldout_prompt_is_learned(tokenizer: Any, words: DomainSpec, new_job: NewJob) -> None:
    def is_held(prompt: str) -> bool:
        return sha256(f"user {prompt}".encode()).digest()[0] < 256 * words.heldout_share

    job = new_job("sft")
    lines = (job.folder / "words.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in lines}
    rows = sft.demonstrations(words, tokenizer, SftConfig(), job)
    learned = {re.split(r"<｜User｜>|<｜Assistant｜>", tokenizer.decode(r.tokens))[1] for r in rows}
    assert learned == {prompt for prompt in prompts if not is_held(prompt)} < prompts


def test_every_step_learns_at_the_rate_of_the_schedule(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft", {"start": start})
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, schedule="linear")
    sft.work(stage(words, num_steps=4, optimizer=optimizer), job)
    rates = [record["learning_rate"] for record in trained(job)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3 / 2])


def test_a_loss_that_is_no_number_stops_the_training_and_leaves_no_checkpoint(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft", {"start": start})
    wild = OptimizerConfig(name="adamw", learning_rate=1e30)
    message = r"sft: loss is nan in step 2 of 3: lower optimizer.learning_rate \(now 1e\+30\)"
    with pytest.raises(FloatingPointError, match=message):
        sft.work(stage(words, num_steps=3, optimizer=wild), job)
    assert not (job.out / training.RESULT).exists()


def test_fewer_demonstrations_are_a_part_of_more(
    tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    few, many = (
        [row.id for row in sft.demonstrations(words, tokenizer, config, new_job("sft"))]
        for config in (SftConfig(num_demonstrations=5), SftConfig(num_demonstrations=20))
    )
    assert len(few) == 5
    assert few == many[:5]


def test_a_row_that_is_too_long_is_left_out_and_counted(
    start: Path, words: DomainSpec, new_job: NewJob, caplog: pytest.LogCaptureFixture
) -> None:
    job = new_job("sft", {"start": start})
    given = stage(words, num_steps=1, max_length=12)
    rows = sft.demonstrations(words, load_tokenizer(start / "checkpoint"), given.sft, job)
    long = {row.id: len(row.tokens) for row in rows if len(row.tokens) > 12}
    assert 0 < len(long) < len(rows)
    sft.work(given, job)
    (counts, *_) = job.metrics.records()
    assert (counts["rows"], counts["rows_too_long"]) == (len(rows) - len(long), len(long))
    (listed,) = json.loads((job.out / "too_long.json").read_text()).values()
    assert {row["id"]: row["tokens"] for row in listed} == long
    assert f"{len(long)} of the {len(rows)} rows of 'words' are longer than 12" in caplog.text
    assert f"up to {max(long.values())}: left out" in caplog.text


def test_a_row_of_exactly_the_limit_is_learned() -> None:
    rows = [TokenRow(str(n), [7] * n, [True] * n) for n in (5, 3, 4)]
    assert [row.id for row in sft.fitting("words", rows, 4)] == ["3", "4"]


def test_every_source_gives_its_own_rows() -> None:
    sources = [[TokenRow("", [10 * s + i] * 2, [False, True]) for i in range(3)] for s in (1, 2)]
    config = SftConfig(num_steps=3, rows_per_step=2)
    data = sft.in_order(sources, config, seed=0, weights=None)
    assert sorted(row[0] for row in data["input_ids"]) == [10, 11, 12, 20, 21, 22]


def test_a_limit_that_no_row_meets_is_refused(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    with pytest.raises(DataError, match=r"none of the .* rows of 'words' fits in 3 tokens"):
        sft.work(stage(words, max_length=3), new_job("sft", {"start": start}))


def test_a_domain_without_demonstrations_is_refused(
    start: Path, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("sft", {"start": start})
    (job.folder / "bare.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    bare = words.model_copy(update={"data": DataConfig(jsonl="bare.jsonl")})
    with pytest.raises(DataError, match="none of its 3 train rows has a response"):
        sft.work(stage(bare), job)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    start: Path,
    words: DomainSpec,
    new_job: NewJob,
    cut_after: Callable[[Path, int], Metrics],
    tmp_path: Path,
    optimizer: str,
) -> None:
    settings = OPTIMIZER.model_copy(update={"name": optimizer})
    config = stage(words, checkpoint_every=2, rows_per_microbatch=2, optimizer=settings)

    def kill_within_a_save(killed: Job) -> None:
        steps = killed.out / training.STEPS
        assert training.newest_complete(steps) == steps / "checkpoint-4"
        shutil.copytree(steps / "checkpoint-2", steps / "checkpoint-6")
        (steps / "checkpoint-6" / training.MARK).unlink()
        (steps / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")

    _, killed = check_killed(
        partial(sft.work, config), new_job, cut_after, start=start, last=5,
        between=kill_within_a_save,
    )  # fmt: skip
    assert not (killed.out / training.STEPS).exists()
