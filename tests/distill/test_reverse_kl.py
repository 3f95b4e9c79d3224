"""The fused loss against arithmetic by hand, a dense float64 reference and TRL's own."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from distill.reverse_kl import ReverseKL, reverse_kl

N, V, H = 13, 29, 6
Pair = tuple[Tensor, Tensor]
"""Hidden states and head."""
HIDDEN_SIZES = (6, 4, 9)
"""The teachers' hidden sizes."""


def dense(
    student: Pair, teachers: Sequence[Pair], mixture_Nn: Tensor, temperature: float
) -> Tensor:
    """l_n of every token by its definition, all logits at once; autograd does the gradients."""
    hidden, head = student
    logp_NV = (hidden @ head.T / temperature).log_softmax(dim=-1)
    logq_iNV = torch.stack([(h @ w.T / temperature).log_softmax(dim=-1) for h, w in teachers])
    logq_bar_NV = (mixture_Nn.T[:, :, None] * logq_iNV).sum(dim=0)
    return (logp_NV.exp() * (logp_NV - logq_bar_NV)).sum(dim=-1)


class Problem:
    """A student and three teachers of other hidden sizes, with mixture and row weights."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, num_rows: int = N, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(num_rows, H).requires_grad_()
        self.head = draw(V, H).requires_grad_()
        self.teachers = [(draw(num_rows, size), draw(V, size)) for size in HIDDEN_SIZES]
        self.mixture = draw(num_rows, len(HIDDEN_SIZES)).softmax(dim=-1)
        self.weight = draw(num_rows).abs()

    def solve(self, *, temperature: float = 1.0, tile_rows: int | None = None) -> ReverseKL:
        """The fused loss of the whole problem."""
        return reverse_kl(
            self.hidden,
            self.head,
            self.teachers,
            mixture=self.mixture,
            row_weight=self.weight,
            temperature=temperature,
            tile_rows=tile_rows,
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Of the hidden states and of the head."""
        return torch.autograd.grad(loss, (self.hidden, self.head))


def test_two_tokens_by_hand() -> None:
    # With the identity for a hidden state, a head's columns are the tokens' logits.
    # Token 0: p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln(2/3) = 0.143841
    #   entropy ln 2, dl/dz = p (log p/q - KL) = (1/2 (ln 2 - KL), 1/2 (ln(2/3) - KL))
    # Token 1: p = (4/5, 1/5), q = (1/2, 1/2): KL = 4/5 ln(8/5) + 1/5 ln(2/5) = 0.192745
    #   entropy 0.500402, dl/dz = 4/25 (ln(8/5) - ln(2/5)) (1, -1) = 4/25 ln 4 (1, -1)
    student = torch.tensor([[0.5, 0.8], [0.5, 0.2]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).log()
    hidden = torch.eye(2)
    kl = reverse_kl(hidden, student, [(hidden, teacher)], row_weight=torch.tensor([1.0, 10.0]))
    kl.loss.backward()
    slope = torch.tensor([[0.274653, 1.6 * 1.386294], [-0.274653, -1.6 * 1.386294]])
    torch.testing.assert_close(kl.per_token, torch.tensor([0.143841, 0.192745]), atol=1e-6, rtol=0)
    torch.testing.assert_close(kl.entropy, torch.tensor([0.693147, 0.500402]), atol=1e-6, rtol=0)
    torch.testing.assert_close(kl.per_teacher[:, 0], kl.per_token)
    torch.testing.assert_close(kl.loss.detach(), torch.tensor(2.071291), atol=1e-5, rtol=0)
    torch.testing.assert_close(student.grad, slope, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_zero_loss_and_gradient(dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    teacher = (problem.hidden.detach().clone(), problem.head.detach().clone())
    kl = reverse_kl(problem.hidden, problem.head, [teacher])
    kl.loss.backward()
    assert kl.loss.item() == 0
    assert torch.equal(kl.per_token, torch.zeros_like(kl.per_token))
    assert torch.equal(problem.hidden.grad, torch.zeros_like(problem.hidden))  # pyright: ignore[reportArgumentType]
    assert torch.equal(problem.head.grad, torch.zeros_like(problem.head))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_value_and_gradients_equal_the_dense_float64_reference(
    dtype: torch.dtype, rtol: float, temperature: float
) -> None:
    exact, problem = Problem(), Problem(dtype)
    per_token = dense((exact.hidden, exact.head), exact.teachers, exact.mixture, temperature)
    loss = (exact.weight * per_token).sum()
    kl = problem.solve(temperature=temperature)
    found = (kl.per_token, kl.loss, *problem.gradients(kl.loss))
    wanted = (per_token, loss, *exact.gradients(loss))
    for ours, reference in zip(found, wanted, strict=True):
        atol = rtol * reference.abs().max().item()
        torch.testing.assert_close(ours.double(), reference, rtol=rtol, atol=atol)


def test_every_teachers_kl_the_entropy_and_the_logsumexp_equal_the_reference() -> None:
    problem = Problem()
    kl = problem.solve(temperature=0.7)
    for i, teacher in enumerate(problem.teachers):
        alone = dense((problem.hidden, problem.head), [teacher], torch.ones(N, 1).double(), 0.7)
        torch.testing.assert_close(kl.per_teacher[:, i], alone.detach(), rtol=1e-12, atol=1e-12)
    logits = (problem.hidden @ problem.head.T).detach() / 0.7
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(kl.entropy, entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl.logsumexp, logits.logsumexp(dim=-1), rtol=1e-12, atol=1e-12)
    mixed = (problem.mixture * kl.per_teacher).sum(dim=-1)
    torch.testing.assert_close(kl.per_token, mixed, rtol=1e-12, atol=0)


def test_gradcheck_through_the_fused_function() -> None:
    problem = Problem(num_rows=5)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        teachers = [problem.teachers[0], problem.teachers[2]]
        mixture = problem.mixture[:, :2]
        weight = problem.weight
        return reverse_kl(
            hidden, head, teachers, mixture=mixture, row_weight=weight, temperature=2.0, tile_rows=2
        ).loss

    assert torch.autograd.gradcheck(loss, (problem.hidden, problem.head))


def test_the_loss_passes_on_the_gradient_it_is_given() -> None:
    problem = Problem()
    once, thrice = problem.solve().loss, 3 * problem.solve().loss
    for ours, scaled in zip(problem.gradients(once), problem.gradients(thrice), strict=True):
        torch.testing.assert_close(3 * ours, scaled, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tile_rows", [1, 4, N, 1000])
def test_the_tile_size_changes_nothing(tile_rows: int) -> None:
    problem = Problem()
    whole, tiled = problem.solve(tile_rows=N), problem.solve(tile_rows=tile_rows)
    for field in fields(ReverseKL):
        ours, theirs = getattr(tiled, field.name), getattr(whole, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(
        problem.gradients(tiled.loss), problem.gradients(whole.loss), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_order_of_rows_changes_nothing() -> None:
    problem, shuffled = Problem(), Problem()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled.hidden = problem.hidden.detach()[order].requires_grad_()
    shuffled.teachers = [(hidden[order], head) for hidden, head in problem.teachers]
    shuffled.mixture, shuffled.weight = problem.mixture[order], problem.weight[order]
    kl, other = problem.solve(tile_rows=5), shuffled.solve(tile_rows=5)
    torch.testing.assert_close(other.per_token, kl.per_token[order], rtol=1e-12, atol=1e-14)
    (hidden, head), (other_hidden, other_head) = (
        problem.gradients(kl.loss),
        shuffled.gradients(other.loss),
    )
    torch.testing.assert_close(other_hidden, hidden[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other_head, head, rtol=1e-12, atol=1e-14)


def test_padding_rows_of_weight_zero_change_nothing() -> None:
    problem, padded = Problem(), Problem(num_rows=N + 3, seed=9)
    with torch.no_grad():
        padded.hidden[:N], padded.head[:] = problem.hidden, problem.head
    for (hidden, head), (other, other_head) in zip(padded.teachers, problem.teachers, strict=True):
        hidden[:N], head[:] = other, other_head
    padded.mixture[:N] = problem.mixture
    padded.weight = torch.cat([problem.weight, torch.zeros(3).double()])
    kl, other = problem.solve(), padded.solve()
    torch.testing.assert_close(other.loss, kl.loss, rtol=1e-12, atol=0)
    (hidden, head), (other_hidden, other_head) = (
        problem.gradients(kl.loss),
        padded.gradients(other.loss),
    )
    torch.testing.assert_close(other_hidden[:N], hidden, rtol=1e-12, atol=1e-14)
    assert torch.equal(other_hidden[N:], torch.zeros(3, H).double())
    torch.testing.assert_close(other_head, head, rtol=1e-12, atol=1e-14)


def test_groups_of_one_teacher_add_up_to_the_mixture() -> None:
    problem = Problem()
    whole = problem.solve()
    parts = [
        reverse_kl(problem.hidden, problem.head, [teacher], row_weight=problem.weight * share)
        for teacher, share in zip(problem.teachers, problem.mixture.T, strict=True)
    ]
    loss = sum((part.loss for part in parts), start=torch.zeros(()).double())
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    for ours, theirs in zip(problem.gradients(loss), problem.gradients(whole.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_by_default_tokens_and_teachers_weigh_the_same() -> None:
    problem = Problem()
    kl = reverse_kl(problem.hidden, problem.head, problem.teachers)
    torch.testing.assert_close(kl.per_token, kl.per_teacher.mean(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(kl.loss.detach(), kl.per_token.mean(), rtol=1e-12, atol=0)


def test_no_tokens_give_a_zero_loss_that_still_has_gradients() -> None:
    problem = Problem(num_rows=0)
    kl = reverse_kl(problem.hidden, problem.head, problem.teachers)
    hidden, head = problem.gradients(kl.loss)
    assert kl.loss.item() == 0
    assert hidden.shape == (0, H)
    assert torch.equal(head, torch.zeros(V, H).double())


def test_one_token_equals_the_reference() -> None:
    problem = Problem(num_rows=1)
    reference = dense((problem.hidden, problem.head), problem.teachers, problem.mixture, 1.0)
    torch.testing.assert_close(problem.solve().per_token, reference.detach(), rtol=1e-12, atol=0)


def test_a_frozen_head_or_frozen_hidden_states_leave_the_other_gradient_alone() -> None:
    problem = Problem()
    hidden, head = problem.gradients(problem.solve().loss)
    problem.head.requires_grad_(False)
    (hidden_alone,) = torch.autograd.grad(problem.solve().loss, (problem.hidden,))
    problem.head.requires_grad_()
    problem.hidden.requires_grad_(False)
    (head_alone,) = torch.autograd.grad(problem.solve().loss, (problem.head,))
    assert torch.equal(hidden_alone, hidden)
    assert torch.equal(head_alone, head)


def test_without_gradients_the_values_are_the_same() -> None:
    problem = Problem()
    with torch.no_grad():
        silent = problem.solve()
    kl = problem.solve()
    assert not silent.loss.requires_grad
    assert torch.equal(silent.loss, kl.loss.detach())
    assert torch.equal(silent.per_token, kl.per_token)


def test_only_the_loss_and_only_the_student_carry_gradients() -> None:
    problem = Problem()
    problem.teachers = [(h.requires_grad_(), w.requires_grad_()) for h, w in problem.teachers]
    kl = problem.solve()
    kl.loss.backward()
    assert kl.loss.requires_grad
    assert not any(t.requires_grad for t in (kl.per_token, kl.entropy, kl.per_teacher))
    assert all(tensor.grad is None for teacher in problem.teachers for tensor in teacher)


def test_bfloat16_inputs_are_computed_in_float32_and_answered_in_bfloat16() -> None:
    problem, wide = Problem(torch.bfloat16), Problem()
    with torch.no_grad():
        wide.hidden[:], wide.head[:] = problem.hidden.double(), problem.head.double()
    wide.teachers = [(h.double(), w.double()) for h, w in problem.teachers]
    wide.mixture, wide.weight = problem.mixture.double(), problem.weight.double()
    kl, exact = problem.solve(tile_rows=3), wide.solve()
    assert kl.per_token.dtype == torch.float32
    torch.testing.assert_close(kl.per_token.double(), exact.per_token, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(problem.gradients(kl.loss), wide.gradients(exact.loss), strict=True):
        assert ours.dtype == torch.bfloat16
        # one rounding to 8 bits at the end, none on the way
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8, atol=1e-5)


def test_autocast_does_not_narrow_the_loss() -> None:
    problem = Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = problem.solve()
    assert torch.equal(inside.per_token, problem.solve().per_token)


def test_logits_of_ten_thousand_stay_finite_and_exact() -> None:
    problem, exact = Problem(torch.float32), Problem()
    with torch.no_grad():
        problem.head.mul_(2000)
        exact.head.mul_(2000)
    reference = dense((exact.hidden, exact.head), exact.teachers, exact.mixture, 1.0)
    kl = problem.solve()
    torch.testing.assert_close(kl.per_token.double(), reference.detach(), rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in problem.gradients(kl.loss))


def test_equal_to_trls_chunked_divergence() -> None:
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    problem = Problem(torch.float32)
    for temperature in (1.0, 0.7):
        for hidden, head in problem.teachers:
            theirs, their_entropy = trl.ChunkedDivergenceFunction.apply(
                problem.hidden, problem.head, None, hidden, head, None, 1.0, temperature
            )
            kl = reverse_kl(
                problem.hidden,
                problem.head,
                [(hidden, head)],
                row_weight=problem.weight,
                temperature=temperature,
            )
            torch.testing.assert_close(kl.per_teacher[:, 0], theirs.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kl.entropy, their_entropy, rtol=1e-5, atol=1e-5)
            ours = problem.gradients(kl.loss)
            for grad, other in zip(
                ours, problem.gradients((problem.weight * theirs).sum()), strict=True
            ):
                torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_by_row_and_teacher(value: float) -> None:
    problem = Problem()
    problem.teachers[1][0][7, 2] = value
    with pytest.raises(FloatingPointError, match="row 7 of teacher 1's hidden states"):
        problem.solve(tile_rows=4)
    problem = Problem()
    with torch.no_grad():
        problem.hidden[3, 0] = value
    with pytest.raises(FloatingPointError, match="row 3 of the student's hidden states"):
        problem.solve()
    problem = Problem()
    problem.teachers[2][1][5, 5] = value
    with pytest.raises(FloatingPointError, match=r"teacher 2.*: not finite: teacher 2's head"):
        problem.solve()


def test_a_row_weight_that_is_not_finite_is_named() -> None:
    problem = Problem()
    problem.weight[4] = float("nan")
    with pytest.raises(FloatingPointError, match="the row weight of row 4 is not finite"):
        problem.solve()


def test_shapes_that_do_not_fit_are_named() -> None:
    problem = Problem()
    hidden, head = problem.teachers[0]
    with pytest.raises(ValueError, match="teacher 0's head has shape"):
        reverse_kl(problem.hidden, problem.head, [(hidden, head[:-1])])
    with pytest.raises(ValueError, match="teacher 1's hidden states has shape"):
        reverse_kl(problem.hidden, problem.head, [(hidden, head), (hidden[1:], head)])
    with pytest.raises(ValueError, match="row_weight has shape"):
        reverse_kl(problem.hidden, problem.head, [(hidden, head)], row_weight=torch.ones(N + 1))
    with pytest.raises(ValueError, match="at least one teacher"):
        reverse_kl(problem.hidden, problem.head, [])
