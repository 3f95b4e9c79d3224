"""The ablations against dense references, and against the reverse KL where they must meet it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import reverse_kl
from distill.divergences import Kind, divergence
from distill.reverse_kl import Head

N, V = 7, 11
KINDS: tuple[Kind, ...] = ("reverse_kl", "forward_kl", "jsd", "top_k", "sampled_token")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Problem:
    """A student and two teachers of other hidden sizes."""

    def __init__(self) -> None:
        self.hidden, self.weight = draw(N, 4).requires_grad_(), draw(V, 4, seed=1).requires_grad_()
        self.bias = draw(V, seed=2).requires_grad_()
        self.head = Head(self.weight, self.bias, 0.8)
        self.teachers = [
            (draw(N, 3, seed=3), draw(V, 3, seed=4)),
            (draw(N, 5, seed=5), draw(V, 5, seed=6)),
        ]
        self.mixture = draw(N, 2, seed=7).softmax(dim=-1)
        self.weights = draw(N, seed=8).abs()
        self.sampled = torch.arange(N) % V
        self.options: dict[str, Any] = {
            "mixture": self.mixture, "row_weight": self.weights, "temperature": 0.7,
        }  # fmt: skip

    def logp(self) -> tuple[Tensor, Tensor]:
        """The student's [N, V] and the teachers' [2, N, V]."""
        z = 0.8 * (self.hidden @ self.weight.T + self.bias)
        ys = torch.stack([hidden @ head.T for hidden, head in self.teachers])
        return (z / 0.7).log_softmax(dim=-1), (ys / 0.7).log_softmax(dim=-1)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(dim=-1)


def jsd(logp: Tensor, logq: Tensor) -> Tensor:
    logm = (0.3 * logq.exp() + 0.7 * logp.exp()).log()
    return 0.3 * kl(logq, logm) + 0.7 * kl(logp, logm)


def top_3(logp: Tensor, logq: Tensor) -> Tensor:
    is_top = logq >= logq.sort(dim=-1, descending=True).values[..., 2:3]
    return torch.where(is_top, logp.exp() * (logp - logq), 0.0).sum(dim=-1)


DENSE: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": kl,
    "forward_kl": lambda logp, logq: kl(logq, logp),
    "jsd": jsd,
    "top_k": top_3,
}


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("tile_rows", [3, 100])
def test_value_and_gradients_equal_the_dense_reference(
    kind: Kind, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.divergences.default_tile_rows", lambda *_: tile_rows)
    problem = Problem()
    logp, logq = problem.logp()
    per_teacher = torch.stack([DENSE[kind](logp, x) for x in logq], dim=-1)
    per_token = (problem.mixture * per_teacher).sum(dim=-1)
    loss = (problem.weights * per_token).sum()
    inputs = (problem.hidden, problem.head, problem.teachers)
    found = divergence(kind, *inputs, **problem.options, beta=0.3, top_k=3)
    entropy = -(logp.exp() * logp).sum(dim=-1)
    ours = (found.loss, found.per_token, found.entropy, found.per_teacher)
    wanted = (loss, per_token, entropy, per_teacher)
    for a, b in zip(
        (*ours, *problem.gradients(found.loss)), (*wanted, *problem.gradients(loss)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    first = 0.8 * (problem.hidden @ problem.weight[0] + problem.bias[0]) / 0.7
    torch.testing.assert_close(found.logsumexp, (first - logp[:, 0]).detach(), rtol=0, atol=1e-12)
    assert not any(x.requires_grad for x in (*ours[1:], found.logsumexp))


def test_sampled_tokens_are_the_reverse_kl_on_average() -> None:
    # every token v in turn, each weighted by p_v: value and gradient of the whole vocabulary
    problem = Problem()
    p = problem.logp()[0].detach().exp()
    inputs = (problem.hidden, problem.head, problem.teachers)
    options = {**problem.options}
    del options["row_weight"]
    total = [torch.zeros(()).double()]
    per_teacher = torch.zeros(N, 2).double()
    for v in range(V):
        sampled, weight = torch.full((N,), v), problem.weights * p[:, v]
        found = divergence("sampled_token", *inputs, **options, row_weight=weight, sampled=sampled)
        total.append(found.loss)
        per_teacher += p[:, v, None] * found.per_teacher
    wanted = divergence("reverse_kl", *inputs, **problem.options)
    torch.testing.assert_close(per_teacher, wanted.per_teacher, rtol=1e-10, atol=1e-13)
    ours, reference = problem.gradients(torch.stack(total).sum()), problem.gradients(wanted.loss)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_forward_kls_gradient_is_the_cross_entropys_averaged_over_the_teachers_tokens() -> None:
    # every token v in turn, each weighted by q_v: sum_v q_v (- log p_v) is the forward KL and the
    # teacher's entropy, which has no gradient
    problem = Problem()
    problem.options["mixture"] = torch.tensor([[1.0, 0.0]]).double().expand(N, 2)
    logp, logq = problem.logp()
    cross = torch.stack(
        [-(problem.weights * logq[0, :, v].exp() * logp[:, v]).sum() for v in range(V)]
    )
    inputs = (problem.hidden, problem.head, problem.teachers)
    found = divergence("forward_kl", *inputs, **problem.options)
    wanted = problem.gradients(cross.sum())
    for a, b in zip(problem.gradients(found.loss), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_whole_vocabulary_is_the_reverse_kls_top_k() -> None:
    problem = Problem()
    inputs = (problem.hidden, problem.head, problem.teachers)
    whole = divergence("top_k", *inputs, **problem.options, top_k=10 * V)
    wanted = reverse_kl.reverse_kl(*inputs, **problem.options)
    torch.testing.assert_close(whole.per_teacher, wanted.per_teacher, rtol=1e-10, atol=1e-13)
    ours, reference = problem.gradients(whole.loss), problem.gradients(wanted.loss)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_none(kind: Kind) -> None:
    problem = Problem()
    teacher = (problem.hidden.detach(), problem.head.detach())
    inputs = (problem.hidden, problem.head, [teacher])
    found = divergence(kind, *inputs, sampled=problem.sampled)
    torch.testing.assert_close(found.per_token, torch.zeros(N).double(), rtol=0, atol=1e-14)
    for grad in problem.gradients(found.loss):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_loss_that_still_has_gradients(kind: Kind) -> None:
    problem = Problem()
    teachers = [(hidden[:0], head) for hidden, head in problem.teachers]
    inputs = (problem.hidden[:0], problem.head, teachers)
    found = divergence(kind, *inputs, sampled=problem.sampled[:0])
    assert found.loss.item() == 0
    assert all(torch.equal(x, torch.zeros_like(x)) for x in problem.gradients(found.loss))


def test_equal_to_trls_forward_kl_and_jsd() -> None:
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    hidden, head = draw(N, 4).float(), draw(V, 4, seed=1).float()
    other, other_head = draw(N, 3, seed=3).float(), draw(V, 3, seed=4).float()
    kinds: tuple[tuple[Kind, float], ...] = (("forward_kl", 0.0), ("jsd", 0.4))
    for kind, beta in kinds:
        theirs, _ = trl.ChunkedDivergenceFunction.apply(
            hidden, head, None, other, other_head, None, beta, 0.7
        )
        ours = divergence(kind, hidden, head, [(other, other_head)], temperature=0.7, beta=beta)
        torch.testing.assert_close(ours.per_token, theirs, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    problem = Problem()
    inputs = (problem.hidden, problem.head, problem.teachers)
    with pytest.raises(ValueError, match="needs `sampled`, 7 token ids; found none"):
        divergence("sampled_token", *inputs)
    with pytest.raises(ValueError, match=r"beta must lie between 0 and 1"):
        divergence("jsd", *inputs, beta=1.0)
    with pytest.raises(ValueError, match="the kinds are reverse_kl, forward_kl"):
        divergence("js", *inputs)  # pyright: ignore[reportArgumentType]
