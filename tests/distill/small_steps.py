"""One training step of small models on rows with gaps, and what it does to them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from distill.balance import Denominator
from distill.batch import Example, ScoredExample
from distill.causal_lm import model_head
from distill.divergences import Kind
from distill.learner import Learner
from distill.mesh import Mesh, Strategy

VOCAB = 40
Models = Callable[[], tuple[Any, dict[str, Any]]]
"""Makes a student and its teachers."""

SHARES = {"code": 1.0, "mathematics": 3.0}
TEACHERS = {"code": "teacher/code", "mathematics": "teacher/mathematics"}

# what each strategy of several ranks can update with
OPTIMIZERS: dict[Strategy, tuple[str, ...]] = {
    "ddp": ("adamw", "muon"),
    "fsdp2": ("adamw", "muon"),
    "zero2": ("adamw",),
    "zero3": ("adamw",),
}

# (domain, length of the row, positions that predict an own token): multi-turn rows have gaps
ROWS = (
    ("code", 9, [4, 5, 6, 7, 8]),
    ("mathematics", 14, [2, 3, 4, 9, 10, 13]),
    ("code", 5, [3, 4]),
    ("mathematics", 3, [2]),
    ("code", 12, [1, 2, 3, 10, 11]),
)


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def tokens(number: int) -> list[int]:
        return torch.randint(3, VOCAB, (number,), generator=generator).tolist()

    return [
        Example(
            domain,
            {TEACHERS[domain]: 1.0},
            tokens(length),
            positions,
            sampled=tokens(len(positions)),
            sampler_logp=[-0.5 * place for place in positions],
        )
        for domain, length, positions in ROWS
    ]


@torch.no_grad()
def scored(rows: Iterable[Example], teachers: dict[str, Any]) -> list[ScoredExample]:
    """Each row read by its teacher alone, without padding."""
    return [
        ScoredExample(
            row,
            {
                name: teachers[name]
                .base_model(torch.tensor([row.input_ids]))
                .last_hidden_state[0, row.positions]
                for name in row.teachers
            },
        )
        for row in rows
    ]


def descent(rate: float = 1.0) -> Callable[[Any], torch.optim.Optimizer]:
    """Plain gradient descent: at rate 1 an update is the gradient."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate)


class Update:
    """What one step does to a model: with plain gradient descent at rate 1, its gradients."""

    def __init__(
        self,
        model: Any,
        teachers: dict[str, Any],
        rows: Sequence[Example],
        *,
        rows_per_microbatch: int = 2,
        tokens_per_microbatch: int | None = None,
        denominator: Denominator = "domain",
        divergence: Kind = "reverse_kl",
        mesh: Mesh | None = None,
    ) -> None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        learner = Learner(
            model,
            descent(),
            mesh=mesh,
            shares=SHARES,
            head=lambda name: model_head(teachers[name], name=name).detach(),
            denominator=denominator,
            divergence=divergence,
            beta=0.3,
            top_k=3,
            temperature=0.8,
            rows_per_microbatch=rows_per_microbatch,
            tokens_per_microbatch=tokens_per_microbatch,
            max_grad_norm=1e9,
        )
        self.metrics = learner.step(scored(rows, teachers))
        after = learner.weights()
        self.gradients = {name: p - after[name] for name, p in before.items()}


CODE, MATHS = TEACHERS.values()
MIXTURES: dict[str, list[dict[str, float]]] = {
    # a mixture by row: one teacher, two, two with other weights
    "several teachers": [
        {CODE: 1.0}, {MATHS: 1.0}, {CODE: 0.7, MATHS: 0.3}, {CODE: 0.2, MATHS: 0.8}, {MATHS: 1.0},
    ],
    # KL to the teachers, which sum to 1, and 0.3 KL to the base, here the other teacher
    "held back by the base": [
        {CODE: 1.0, MATHS: 0.3}, {CODE: 0.3, MATHS: 1.0}, {CODE: 1.0, MATHS: 0.3},
        {CODE: 0.3, MATHS: 1.0}, {CODE: 1.0, MATHS: 0.3},
    ],
}  # fmt: skip


def mixed(name: str) -> list[Example]:
    return [replace(r, teachers=m) for r, m in zip(examples(), MIXTURES[name], strict=True)]


def small_models(make_model: Callable[..., Any]) -> Models:
    """A student and two teachers, one of them of another hidden size; the same at each call.
    `make_model` is the fixture."""

    def make() -> tuple[Any, dict[str, Any]]:
        teachers = {
            TEACHERS["code"]: make_model(1, VOCAB),
            TEACHERS["mathematics"]: make_model(2, VOCAB, hidden_size=48),
        }
        return make_model(0, VOCAB), teachers

    return make
