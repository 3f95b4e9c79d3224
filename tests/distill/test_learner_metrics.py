"""What a training step logs: by domain, by teacher, by who sampled."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_steps import (
    CODE,
    MATHS,
    SHARES,
    VOCAB,
    Models,
    Update,
    examples,
    mixed,
    small_models,
)

from distill.batch import Example


@pytest.fixture
def models(make_model: Callable[..., Any]) -> Models:
    return small_models(make_model)


def test_metrics_by_domain_add_up_to_the_loss(models: Models) -> None:
    metrics = Update(*models(), examples()).metrics
    loss = 0.25 * metrics["kl/code"] + 0.75 * metrics["kl/mathematics"]
    torch.testing.assert_close(metrics["loss"], loss, rtol=1e-6, atol=0)
    for name in ("share", "token_share", "grad_share"):
        shares = metrics[f"{name}/code"] + metrics[f"{name}/mathematics"]
        torch.testing.assert_close(shares, torch.ones_like(shares), rtol=1e-12, atol=0)
    assert metrics["token_share/code"] == 12 / 19
    assert (metrics["tokens/code"], metrics["tokens/mathematics"]) == (12, 7)
    assert 0 < metrics["entropy/code"] < torch.tensor(VOCAB).log()


def test_a_domain_absent_from_a_step_leaves_its_share_to_the_others(
    models: Models,
) -> None:
    rows = [row for row in examples() if row.domain == "code"]
    metrics = Update(*models(), rows).metrics
    torch.testing.assert_close(metrics["loss"], metrics["kl/code"], rtol=1e-6, atol=0)
    assert "kl/mathematics" not in metrics


OFFSETS = (0.0, 0.25, -0.5, 1.0, -0.125, 0.0, 2.0)
"""By how much, token after token, a sampler was surer than the student."""


@torch.no_grad()
def sampled_by_another(model: Any, rows: Sequence[Example]) -> list[Example]:
    """The rows with the log-probabilities of a sampler that differs by OFFSETS in each row."""
    found: list[Example] = []
    for row in rows:
        logits_SV = model(torch.tensor([row.input_ids])).logits[0].double()
        logp_SV = (logits_SV / 0.8).log_softmax(dim=-1)
        own = [logp_SV[p, t].item() for p, t in zip(row.positions, row.sampled, strict=True)]
        offsets = OFFSETS[: len(own)]
        found.append(replace(row, sampler_logp=[p + o for p, o in zip(own, offsets, strict=True)]))
    return found


@pytest.mark.parametrize("rows_per_microbatch", [1, 5])
def test_mean_and_largest_log_ratio_of_the_sampled_tokens_by_hand(
    models: Models, rows_per_microbatch: int
) -> None:
    # code has rows of 5, 2 and 5 own tokens: |offsets| sum to 1.875 + 0.25 + 1.875 = 4 over 12;
    # mathematics 6 and 1: 1.875 + 0 over 7; the largest is 1 in both, the 2.0 belongs to a 7th
    model, teachers = models()
    rows = sampled_by_another(model, examples())
    metrics = Update(model, teachers, rows, rows_per_microbatch=rows_per_microbatch).metrics
    wanted = {
        "sampler_gap/code": 4 / 12,
        "sampler_gap/mathematics": 1.875 / 7,
        "sampler_gap": 5.875 / 19,
        "sampler_gap_max/code": 1.0,
        "sampler_gap_max/mathematics": 1.0,
        "sampler_gap_max": 1.0,
    }
    found = {name: metrics[name].item() for name in wanted}
    assert found == pytest.approx(wanted, rel=1e-4)


def test_what_teachers_sampled_is_learned_alike_and_logged_apart(models: Models) -> None:
    rows = mixed("several teachers")
    is_taught = [True, False, False, True, False]
    marked = [replace(r, by_teacher=t) for r, t in zip(rows, is_taught, strict=True)]
    plain, found = Update(*models(), rows), Update(*models(), marked)
    for name, gradient in plain.gradients.items():
        assert torch.equal(found.gradients[name], gradient)
    assert found.metrics["loss"] == plain.metrics["loss"]
    # of code (5 own tokens, then 2 and 5) the first row is the teacher's; of mathematics (6, 1) the
    # second: what a domain's rows are alone is what is logged of them
    alone = {t: Update(*models(), [r for r in marked if r.by_teacher == t]) for t in (False, True)}
    for domain in SHARES:
        for prefix, t in (("", False), ("off_policy_", True)):
            for name in ("kl", "entropy", "tokens"):
                ours = found.metrics[f"{prefix}{name}/{domain}"]
                torch.testing.assert_close(ours, alone[t].metrics[f"{prefix}{name}/{domain}"])
    assert "kl/code" not in alone[True].metrics
    assert "off_policy_kl/code" not in alone[False].metrics
    assert (found.metrics["tokens/code"], found.metrics["off_policy_tokens/code"]) == (7, 5)
    for name in ("sampler_gap", "sampler_gap_max", f"kl/code/{CODE}", f"kl/code/{MATHS}"):
        torch.testing.assert_close(found.metrics[name], alone[False].metrics[name])
    assert f"kl/mathematics/{MATHS}" in plain.metrics
    assert f"kl/mathematics/{MATHS}" not in found.metrics  # the one row of both is the teacher's
    for name in ("share/code", "grad_share/code", "token_share/code"):
        torch.testing.assert_close(found.metrics[name], plain.metrics[name])


@pytest.mark.parametrize("rows_per_microbatch", [1, 5])
def test_gradients_at_the_hidden_states_are_autograds_of_the_dense_loss(
    models: Models, rows_per_microbatch: int
) -> None:
    model, teachers = models()
    rows, tokens = examples(), {"code": 12, "mathematics": 7}
    squares = dict.fromkeys(SHARES, 0.0)
    for row in rows:
        ids, places = torch.tensor([row.input_ids]), row.positions
        (name,) = row.teachers
        with torch.no_grad():
            seen = [m.base_model(ids).last_hidden_state[0, places] for m in (model, teachers[name])]
            heads = [m.get_output_embeddings().weight.double() for m in (model, teachers[name])]
        hidden_NH = seen[0].double().requires_grad_()
        logp, logq = (
            (x.double() @ head.T / 0.8).log_softmax(dim=-1)
            for x, head in zip((hidden_NH, seen[1]), heads, strict=True)
        )
        weight = SHARES[row.domain] / sum(SHARES.values()) / tokens[row.domain]
        loss = weight * (logp.exp() * (logp - logq)).sum()
        (gradient,) = torch.autograd.grad(loss, hidden_NH)
        squares[row.domain] += float(gradient.square().sum())
    metrics = Update(model, teachers, rows, rows_per_microbatch=rows_per_microbatch).metrics
    norms = {domain: square**0.5 for domain, square in squares.items()}
    for domain, norm in norms.items():
        assert metrics[f"hidden_grad/{domain}"].item() == pytest.approx(norm, rel=1e-4)
        share = metrics[f"grad_share/{domain}"].item()
        assert share == pytest.approx(norm / sum(norms.values()), rel=1e-4)
