"""What a learner holds at once: a teacher's head, a micro-batch's hidden states."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learner import SHARES, TEACHERS, VOCAB, descent, examples, scored
from transformers import LlamaConfig, LlamaForCausalLM

from distill.balance import Totals
from distill.batch import MicroBatch, ScoredExample
from distill.causal_lm import check_untied
from distill.hidden_store import HiddenRow, write_row
from distill.learner import Learner
from distill.reverse_kl import Head
from distill.tally import Tally
from posttrain.errors import CheckpointError


def learner(
    make_model: Callable[..., Any], head: Callable[[str], Any], kind: type[Learner] = Learner
) -> Learner:
    model = make_model(0, VOCAB)
    return kind(model, descent(0.0), shares=SHARES, head=head, rows_per_microbatch=1)


@pytest.mark.parametrize(
    ("teachers_of", "beside"), [(("a", "b", "c"), (0, 0, 0)), (("ab", "c", "bc"), (0, 1, 1))]
)
def test_the_heads_of_a_tokens_teachers_are_read_once_a_step_and_then_let_go(
    make_model: Callable[..., Any], teachers_of: Sequence[str], beside: Sequence[int]
) -> None:
    teachers = {name: make_model(i, VOCAB) for i, name in enumerate("abc", start=1)}
    mixtures = [dict.fromkeys(names, 1 / len(names)) for names in teachers_of]
    rows = [replace(r, teachers=mixtures[i % 3]) for i, r in enumerate(examples() * 2)]
    read: list[tuple[str, int]] = []
    held: list[weakref.ref[torch.Tensor]] = []

    def load(name: str) -> torch.Tensor:
        read.append((name, sum(ref() is not None for ref in held)))
        head = teachers[name].get_output_embeddings().weight.detach().clone()
        held.append(weakref.ref(head))
        return head

    ours = learner(make_model, load)
    for _ in range(2):  # of ten micro-batches each
        read.clear()
        ours.step(scored(rows, teachers))
        assert read == list(zip("abc", beside, strict=True))


def test_hidden_states_are_read_when_their_microbatch_comes(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    teachers = {name: make_model(i, VOCAB) for i, name in enumerate(TEACHERS.values(), start=1)}
    events: list[str] = []

    class Noted(HiddenRow):
        def read(self) -> torch.Tensor:
            events.append("read")
            return super().read()

    class Watched(Learner):
        def _learn(self, batch: MicroBatch, totals: Totals, tally: Tally) -> None:
            events.append("learn")
            super()._learn(batch, totals, tally)

    def head(name: str) -> torch.Tensor:
        return teachers[name].get_output_embeddings().weight

    rows: list[ScoredExample] = []
    for number, row in enumerate(scored(examples(), teachers)):
        (name,) = row.example.teachers
        write_row(tmp_path / str(number), row.hidden(name))
        rows.append(ScoredExample(row.example, {name: Noted(str(tmp_path / str(number)))}))
    learner(make_model, head, Watched).step(rows)
    assert events == ["read", "learn"] * len(rows)


def test_rows_of_a_head_hold_no_memory_of_the_others() -> None:
    head = Head(torch.randn(12, 4), torch.randn(12), scale=0.5)
    rows = head.rows(slice(3, 8))
    assert torch.equal(rows.weight, head.weight[3:8])
    assert rows.bias is not None
    assert head.bias is not None
    assert torch.equal(rows.bias, head.bias[3:8])
    assert rows.scale == 0.5
    assert rows.weight.untyped_storage().nbytes() == 5 * 4 * 4
    assert rows.bias.untyped_storage().nbytes() == 5 * 4


def test_a_head_that_is_the_embedding_too_is_not_kept_in_parts() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    for tied in (False, True):
        config = LlamaConfig(vocab_size=9, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
        model = LlamaForCausalLM(config)
        if not tied:
            check_untied(model)
            continue
        with pytest.raises(CheckpointError, match="vocab_parallel to false"):
            check_untied(model)
