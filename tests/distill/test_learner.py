"""One training step against a dense loop over unpadded rows, and what must not change it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_steps import (
    CODE,
    MATHS,
    MIXTURES,
    SHARES,
    TEACHERS,
    VOCAB,
    Models,
    Update,
    descent,
    examples,
    mixed,
    scored,
    small_models,
)
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from distill.balance import Denominator
from distill.batch import Example
from distill.divergences import Kind
from distill.learner import Learner
from posttrain.backbone.auxiliary import scale_own_losses

Measure = Callable[[Tensor, Tensor, int], Tensor]
"""(logp_V, logq_V, the token that was sampled) -> a token's divergence."""


@pytest.fixture
def models(make_model: Callable[..., Any]) -> Models:
    return small_models(make_model)


def assert_same_update(found: Update, wanted: Update) -> None:
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=5e-6)
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-4, atol=1e-7)


def reverse_kl(logp: Tensor, logq: Tensor, token: int) -> Tensor:
    return (logp.exp() * (logp - logq)).sum()


def forward_kl(logp: Tensor, logq: Tensor, token: int) -> Tensor:
    return (logq.exp() * (logq - logp)).sum()


def jsd(logp: Tensor, logq: Tensor, token: int) -> Tensor:
    logm = (0.3 * logq.exp() + 0.7 * logp.exp()).log()
    return 0.3 * forward_kl(logm, logq, token) + 0.7 * reverse_kl(logp, logm, token)


def top_3(logp: Tensor, logq: Tensor, token: int) -> Tensor:
    top = logq.topk(3).indices
    return reverse_kl(logp[top], logq[top], token)


def sampled_token(logp: Tensor, logq: Tensor, token: int) -> Tensor:
    ratio = (logp[token] - logq[token]).detach()
    return ratio * (1 + logp[token] - logp[token].detach())  # its value, and its score's gradient


MEASURES: dict[Kind, Measure] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "top_k": top_3,
    "sampled_token": sampled_token,
}


def dense_loss(
    model: Any,
    teachers: dict[str, Any],
    weight: dict[str, float],
    measure: Measure = reverse_kl,
    rows: Sequence[Example] | None = None,
) -> Tensor:
    """Row by row and token by token from whole logits; `weight` of one token of each domain."""
    loss = torch.zeros(())
    rows = rows or examples()
    for row in rows:
        num_tokens = sum(len(other.input_ids) for other in rows)
        scale_own_losses(model.train(), len(row.input_ids) / num_tokens)
        ids = torch.tensor([row.input_ids])
        logits = model(ids).logits[0]
        with torch.no_grad():
            teacher_logits = {name: teachers[name](ids).logits[0] for name in row.teachers}
        for position, token in zip(row.positions, row.sampled, strict=True):
            logp = (logits[position].double() / 0.8).log_softmax(-1)
            for name, share in row.teachers.items():
                logq = (teacher_logits[name][position].double() / 0.8).log_softmax(-1)
                loss = loss + weight[row.domain] * share * measure(logp, logq, token)
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("kind", MEASURES)
def test_a_step_equals_a_dense_loop_over_unpadded_rows(models: Models, kind: Kind) -> None:
    model, teachers = models()
    # 12 tokens of code with a quarter of the loss, 7 of mathematics with three quarters
    weight = {"code": 0.25 / 12, "mathematics": 0.75 / 7}
    with torch.no_grad():
        kl = dense_loss(model, teachers, weight)
    loss = dense_loss(model, teachers, weight, MEASURES[kind])
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    update = Update(model, teachers, examples(), divergence=kind)
    torch.testing.assert_close(update.metrics["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    found = 0.25 * update.metrics["kl/code"] + 0.75 * update.metrics["kl/mathematics"]
    torch.testing.assert_close(found, kl, rtol=1e-5, atol=0)
    for name, gradient in wanted.items():
        torch.testing.assert_close(update.gradients[name], gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("rows_per_microbatch", [2, 5])
def test_a_step_of_several_teachers_equals_a_dense_loop(
    models: Models, name: str, rows_per_microbatch: int
) -> None:
    model, teachers = models()
    weight = {"code": 0.25 / 12, "mathematics": 0.75 / 7}
    loss = dense_loss(model, teachers, weight, rows=mixed(name))
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    update = Update(model, teachers, mixed(name), rows_per_microbatch=rows_per_microbatch)
    torch.testing.assert_close(update.metrics["loss"], loss.detach(), rtol=1e-5, atol=0)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(update.gradients[parameter], gradient, rtol=1e-4, atol=2e-6)


def test_the_gradient_of_several_teachers_is_the_weighted_sum_of_each_ones(models: Models) -> None:
    both = [replace(row, teachers={CODE: 0.6, MATHS: 0.4}) for row in examples()]
    found = Update(*models(), both)
    weight = {CODE: 0.6, MATHS: 0.4}
    alone = {
        name: Update(*models(), [replace(row, teachers={name: 1.0}) for row in examples()])
        for name in weight
    }
    for parameter, gradient in found.gradients.items():
        wanted = sum(w * alone[name].gradients[parameter] for name, w in weight.items())
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=2e-6)
    for domain in SHARES:
        for name in weight:  # its own KL, whoever else reads
            torch.testing.assert_close(
                found.metrics[f"kl/{domain}/{name}"],
                alone[name].metrics[f"kl/{domain}"],
                rtol=1e-5,
                atol=0,
            )


@pytest.mark.parametrize("denominator", ["domain", "token", "sequence"])
@pytest.mark.parametrize(("num_rows", "num_tokens"), [(1, None), (3, None), (100, 20)])
def test_the_microbatch_changes_nothing(
    models: Models, num_rows: int, num_tokens: int | None, denominator: Denominator
) -> None:
    rows = mixed("several teachers")
    whole = Update(*models(), rows, rows_per_microbatch=5, denominator=denominator)
    cut = Update(
        *models(),
        rows,
        rows_per_microbatch=num_rows,
        tokens_per_microbatch=num_tokens,
        denominator=denominator,
    )
    assert_same_update(cut, whole)


def test_the_order_of_rows_changes_nothing(models: Models) -> None:
    assert_same_update(
        Update(*models(), examples()[::-1], rows_per_microbatch=3),
        Update(*models(), examples(), rows_per_microbatch=3),
    )


def test_a_student_that_is_its_teachers_stays_as_it_is(models: Models) -> None:
    student, _ = models()
    twin, _ = models()
    rows = examples()
    update = Update(student, dict.fromkeys(TEACHERS.values(), twin), rows)
    assert update.metrics["loss"].abs() < 1e-6  # the teacher read its rows unpadded
    # the indexer learns from attention, not from the teacher
    found = {name: g for name, g in update.gradients.items() if "indexer" not in name}
    assert all(gradient.abs().max() < 1e-5 for gradient in found.values())


def test_the_gradient_is_clipped_to_its_norm_and_the_rate_follows_the_schedule(
    models: Models,
) -> None:
    model, teachers = models()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    learner = Learner(
        model,
        descent(2.0),
        shares=SHARES,
        head=lambda name: teachers[name].get_output_embeddings().weight,
        max_grad_norm=1e-2,
    )
    metrics = learner.step(scored(examples(), teachers), learning_rate_factor=0.5)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert metrics["grad_norm"] > 1e-2
    torch.testing.assert_close((after - before).norm(), torch.tensor(1e-2), rtol=1e-3, atol=0)
    learner.step(scored(examples(), teachers), learning_rate_factor=0.25)
    (group,) = learner.optimizer.param_groups
    assert group["lr"] == 0.5  # of the peak, whatever the step before had


def test_a_loss_that_is_not_finite_updates_nothing(
    models: Models, caplog: pytest.LogCaptureFixture
) -> None:
    model, teachers = models()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = scored(examples(), teachers)
    rows[1].hidden(MATHS)[0, 0] = float("nan")
    learner = Learner(
        model,
        descent(1.0),
        shares=SHARES,
        head=lambda name: teachers[name].get_output_embeddings().weight,
    )
    with caplog.at_level("WARNING"):
        metrics = learner.step(rows)
    assert "teacher 0's hidden states" in caplog.text
    assert metrics["updates_skipped"] == 1
    assert not metrics["grad_norm"].isfinite()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    learner.step(scored(examples(), teachers))  # the next one is as if nothing had been
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_updates_nothing(models: Models) -> None:
    model, teachers = models()
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = Learner(
        model,
        descent(1.0),
        shares=SHARES,
        head=lambda name: teachers[name].get_output_embeddings().weight,
    )
    assert learner.step(scored(examples(), teachers))["updates_skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_architecture_with_tied_embeddings_learns_the_same_way() -> None:
    def gpt2(seed: int, hidden_size: int) -> GPT2LMHeadModel:
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=32, n_embd=hidden_size, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return GPT2LMHeadModel(config).eval()

    teachers = {TEACHERS["code"]: gpt2(1, 16), TEACHERS["mathematics"]: gpt2(2, 24)}
    wanted, model = gpt2(0, 16), gpt2(0, 16)
    for student in (wanted, model):  # the learner trains, where dropout would be random
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    dense_loss(wanted, teachers, {"code": 0.25 / 12, "mathematics": 0.75 / 7}).backward()
    update = Update(model, teachers, examples())
    for name, parameter in wanted.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(update.gradients[name], parameter.grad, rtol=1e-4, atol=2e-6)


def test_shares_that_are_given_later_count_like_the_first(models: Models) -> None:
    model, teachers = models()
    wanted = Update(model, teachers, examples())
    again, _ = models()
    learner = Learner(
        again,
        descent(),
        shares=dict.fromkeys(SHARES, 1.0),
        head=lambda name: teachers[name].get_output_embeddings().weight,
        temperature=0.8,
        max_grad_norm=1e9,
    )
    before = {name: tensor.clone() for name, tensor in learner.weights().items()}
    learner.weigh(SHARES)
    learner.step(scored(examples(), teachers))
    after = learner.weights()
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(before[name] - after[name], gradient, rtol=1e-4, atol=5e-6)


def test_a_warmup_minimises_the_forward_kl(models: Models) -> None:
    rows = [replace(row, is_warmup=True, by_teacher=True) for row in examples()]
    found = Update(*models(), rows)
    wanted = Update(*models(), examples(), divergence="forward_kl")
    for name, gradient in wanted.gradients.items():
        assert torch.equal(found.gradients[name], gradient)
    forward = wanted.metrics["divergence/code"]
    assert found.metrics["off_policy_divergence/code"] == forward
    assert found.metrics["off_policy_kl/code"] == wanted.metrics["kl/code"]
