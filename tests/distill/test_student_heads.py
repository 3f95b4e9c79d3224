"""A student's head may have a bias and a scale; what the loss cannot rebuild is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import KINDS, headed
from small_steps import TEACHERS, VOCAB, Update, examples
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from distill.divergences import Kind
from distill.learner import Learner
from distill.logits import logit_scale
from posttrain.errors import CheckpointError

WEIGHT = {"code": 0.25 / 12, "mathematics": 0.75 / 7}  # shares 1 and 3, 12 and 7 tokens


def teachers(make_model: Callable[..., Any], kind: str) -> dict[str, Any]:
    """One like the student, and a V4."""
    names = TEACHERS.values()
    return dict(zip(names, (headed(kind, 1, VOCAB), make_model(2, VOCAB)), strict=True))


def dense_loss(model: Any, others: dict[str, Any], kind: Kind) -> Tensor:
    """Row by row from the models' own logits."""
    loss = torch.zeros((), dtype=torch.float64)
    for row in examples():
        (name,), ids = row.teachers, torch.tensor([row.input_ids])
        with torch.no_grad():
            logq = (others[name](ids).logits[0, row.positions].double() / 0.8).log_softmax(-1)
        logp = (model(ids).logits[0, row.positions].double() / 0.8).log_softmax(-1)
        one, other = (logp, logq) if kind == "reverse_kl" else (logq, logp)
        loss = loss + WEIGHT[row.domain] * (one.exp() * (one - other)).sum()
    return loss


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_models_own_logits(
    make_model: Callable[..., Any], kind: str, divergence: Kind
) -> None:
    model, others = headed(kind, 0, VOCAB), teachers(make_model, kind)
    loss = dense_loss(model, others, divergence)
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    update = Update(headed(kind, 0, VOCAB), others, examples(), divergence=divergence)
    torch.testing.assert_close(update.metrics["loss"], loss.detach(), rtol=1e-5, atol=0)
    assert update.gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(update.gradients[name], gradient, rtol=1e-5, atol=2e-6)
    for parameter in model.get_output_embeddings().parameters():
        assert parameter.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_sampled_tokens_are_those_of_its_logits(
    make_model: Callable[..., Any], kind: str
) -> None:
    model, others, rows = headed(kind, 0, VOCAB), teachers(make_model, kind), examples()
    gaps: list[float] = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row.input_ids])).logits[0, row.positions]
            logp = (logits.double() / 0.8).log_softmax(-1)[range(len(row.sampled)), row.sampled]
            gaps += (logp - torch.tensor(row.sampler_logp)).abs().tolist()
    found = Update(model, others, rows).metrics["sampler_gap"]
    assert abs(float(found) - sum(gaps) / len(gaps)) < 1e-5 * sum(gaps)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, 1.0),
        ({"model_type": "minicpm3", "logits_scaling": 4}, 0.25),
        ({"model_type": "x", "text_config": {"model_type": "hyperclovax", "logits_scaling": 4}}, 4),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5),
    ],
)
def test_a_scale_is_read_of_the_field_that_the_architecture_has(
    config: dict[str, Any], wanted: float
) -> None:
    assert logit_scale(config, name="it") == wanted


def refused(model: Any) -> str:
    def fail(_: Any) -> Any:
        pytest.fail("too late")

    with pytest.raises(CheckpointError) as error:
        Learner(model, fail, shares={}, head=fail)
    return str(error.value)


def test_capped_logits_are_refused_before_anything_is_learned() -> None:
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    message = refused(Gemma2ForCausalLM(config))
    assert message.startswith("the student changes its logits by final_logit_softcapping")


def test_logits_that_no_config_tells_of_are_refused() -> None:
    """A head that squares what it gives."""
    model = headed("bias", 0, VOCAB)

    class Squared(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
            return super().forward(input) ** 2

    model.lm_head.__class__ = Squared
    assert "are not its head's of its last hidden states" in refused(model)
