"""What a recipe says about on-policy distillation. Imports no torch, so that checks are fast."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config import Config, OptimizerConfig
from posttrain.domains import DomainSpec


class DivergenceConfig(Config):
    """How student and teacher are compared at a token; all but `reverse_kl` are ablations."""

    kind: Literal["reverse_kl", "forward_kl", "jsd", "top_k", "sampled_token"] = "reverse_kl"
    """`reverse_kl`: KL(student || teacher) over the whole vocabulary; `forward_kl`: KL(teacher ||
    student); `jsd`: between the two; `top_k`: the reverse KL's terms of the teacher's likeliest
    tokens alone; `sampled_token`: its estimate from the token that was sampled. `kl` is logged as
    the reverse KL whatever is trained, at the cost of computing both, and what is trained as
    `divergence`."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's weight in the mixture of `jsd`."""
    top_k: int = Field(default=32, ge=1)
    """How many tokens `top_k` compares."""


class DistillConfig(Config):
    """How the student is distilled; the same for every domain."""

    num_steps: int = Field(default=80, ge=1)
    """Optimizer steps; each one samples, scores and learns once."""
    prompts_per_step: int = Field(default=96, ge=1)
    """One rollout per prompt, spread evenly over all domains."""
    start: str = "base"
    """Where the student starts: "base", "average", or an input such as "specialist/mathematics"."""
    temperature: float = Field(default=1.0, gt=0)
    """The rollouts' temperature and the loss's, which have to be one: the KL is taken of the
    distribution that was sampled."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    """The student's optimizer."""
    rows_per_microbatch: int = Field(default=64, ge=1)
    """Rows in memory at once, on the learner and on a teacher. Changes speed and memory, never
    the result beyond rounding."""
    domain_shares: dict[str, float] | None = None
    """Each domain's share of the loss, in any unit and 1 where not named; they are normalised over
    the domains that a step holds. Used by the `domain` denominator."""
    denominator: Literal["domain", "token", "sequence"] = "domain"
    """What a token's KL is divided by. `domain`: the step's tokens of its domain (and multiplied by
    the domain's share); `token`: all tokens of the step; `sequence`: its row's tokens, and the
    number of rows."""
    divergence: DivergenceConfig = DivergenceConfig()
    """What is minimised at each token."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between two step checkpoints; a killed run loses at most that many."""
    num_slots: int = Field(default=64, ge=1)
    """Rollouts that are decoded side by side."""
    num_resident_teachers: int = Field(default=8, ge=1)
    """Teachers, and their heads on the learner, in memory at once; the least recently used one
    makes room. Changes speed and memory, never the result."""
    teacher_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for one teacher to score one step's rows."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between two scores of the student, logged as `score/<domain>` and `score/macro`; the
    first before any step, the last after the last one. 0: none. Changes no weight."""
    evaluate_prompts: int = Field(default=64, ge=1)
    """At most so many held-out prompts of each domain in such a score, the first of its split."""
    evaluate_samples: int = Field(default=1, ge=1)
    """Samples of each of these prompts, at temperature 1 and with the same seeds every time."""

    @field_validator("domain_shares")
    @classmethod
    def shares_are_positive(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        wrong = {name: share for name, share in (shares or {}).items() if not share > 0}
        if wrong:
            raise ValueError(
                f"domain_shares must be above 0, found {wrong}: leave a domain out of the recipe "
                "to keep it out of the loss"
            )
        return shares


class OpdStage(Config):
    """One distillation: the domains, how, and who teaches each."""

    domains: list[DomainSpec] = Field(min_length=1)
    """Where the prompts come from."""
    distill: DistillConfig
    """How the student is distilled."""
    teachers: dict[str, str]
    """Domain to its teacher: a stage input such as "specialist/mathematics", or the path of a
    checkpoint relative to the recipe."""

    @model_validator(mode="after")
    def every_domain_has_one_teacher(self) -> Self:
        names = [domain.name for domain in self.domains]
        if sorted(self.teachers) != sorted(names):
            raise ValueError(
                f"teachers names {sorted(self.teachers)}, but the domains are {sorted(names)}: "
                "give one teacher for each domain and no other"
            )
        return self

    @model_validator(mode="after")
    def shares_belong_to_domains(self) -> Self:
        unknown = sorted(set(self.distill.domain_shares or {}) - set(self.teachers))
        if unknown:
            raise ValueError(
                f"distill.domain_shares names {unknown}, but the domains are "
                f"{sorted(self.teachers)}: remove the former or rename them"
            )
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of the loss, in any unit, by name."""
        given = self.distill.domain_shares or {}
        return {domain.name: given.get(domain.name, 1.0) for domain in self.domains}
