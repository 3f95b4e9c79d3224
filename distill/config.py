"""What a recipe says about on-policy distillation. Imports no torch, so that checks are fast."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config import Config, OptimizerConfig
from posttrain.domains import DomainSpec

BASE = "base"
"""The teacher that holds the student back: the recipe's base."""


def check_weights(weights: Mapping[str, float], *, of: str) -> None:
    """Raise ValueError unless there are some, and each is above 0."""
    wrong = {name: weight for name, weight in weights.items() if not weight > 0}
    if wrong or not weights:
        raise ValueError(
            f"{of} need weights above 0, found {wrong or 'no teacher'}: leave out who is not to "
            "teach, and name at least one"
        )


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


class GuardConfig(Config):
    """Which gradients are not used. One whose norm is not finite never is."""

    spike_factor: float | None = Field(default=20.0, gt=1)
    """A gradient is a spike, and its update is skipped, where its norm is above so many times the
    median of the last 64 updates'; null: none is."""
    max_skipped: int = Field(default=3, ge=1)
    """After so many skipped updates in a row the student goes back to its last step checkpoint and
    on with other prompts, once in a run; after as many again the run stops."""


class AllocationConfig(Config):
    """How a step's prompts are shared out among the domains."""

    by: Literal["even", "kl", "score"] = "even"
    """`even`: the same number for each, give or take one; `kl`: in proportion to its `kl/<domain>`
    of the steps learned so far; `score`: in proportion to how far `score/<domain>`, of the steps
    that have one (evaluate_every), is below what the domain's teachers score on the same held-out
    prompts. Each domain's share of the loss stays what it was; what was dealt is logged as
    `prompts/<domain>`."""
    floor: float = Field(default=0.5, gt=0, le=1)
    """A domain's prompts are at least so many times the even share, unless `even`."""
    ceiling: float = Field(default=2.0, ge=1)
    """A domain's prompts are at most so many times the even share, unless `even`."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """How much of a domain's smoothed gap the next step's leaves standing, unless `even`; with
    `score`, the next score's."""


class TeacherSamplesConfig(Config):
    """Answers that the teachers sample, learned beside the student's own and before them. They are
    logged apart: `off_policy_prompts/<domain>`, `off_policy_tokens/<domain>`,
    `off_policy_kl/<domain>`."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """The share of each domain's rows that are answers of its teachers; the divergence is the same
    at their tokens. 1 less this is GKD's lambda. 0: none."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps, of num_steps, that learn the teachers' answers alone, by the forward KL: the
    cross-entropy of supervised training, averaged at each token over what the teacher might have
    said there."""
    prompts_per_domain: int = Field(default=256, ge=1)
    """Training prompts of each domain that its teachers answer, at most; once, before they are
    needed first. Steps walk through these answers again and again."""


class EndingsConfig(Config):
    """What is learned of rollouts that end in a loop or out of tokens. How many do is logged as
    `looped/<domain>` and `truncated/<domain>`, what is left out for it as `masked_tokens/<domain>`
    and `dropped/<domain>`."""

    looped: Literal["keep", "mask", "drop"] = "keep"
    """A rollout that ends in a loop: `keep`: all its tokens; `mask`: those before the loop and of
    its first round; `drop`: none."""
    truncated: Literal["keep", "drop"] = "keep"
    """A rollout that max_new_tokens cuts: `keep`: all its tokens; `drop`: none."""
    loop_window: int = Field(default=32, ge=4)
    """A rollout ends in a loop if its last so many tokens repeat a pattern of at most a quarter of
    them."""


class EarlyStopConfig(Config):
    """When a run ends before num_steps: every domain's KL has flattened."""

    max_slope: float | None = Field(default=None, gt=0)
    """It ends where a line through each domain's `kl/<domain>` of the last `window` steps rises or
    falls over them by at most so many times their mean; the largest is logged as `kl_slope`, and
    `stopped` in the last step. 0.05 is a change of 5%. Null: it never does."""
    window: int = Field(default=20, ge=3)
    """Steps that the line goes through."""


class LearnersConfig(Config):
    """The processes that learn together; they take the steps that one would take."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes; each takes its part of a step's rows. The run needs as many workers."""
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    """`ddp`: each holds the whole student; `fsdp2`: each holds a part of it and of the optimizer's
    state and gathers one layer at a time, and the first also a whole copy, which samples; `zero2`:
    each holds the whole student and a part of the optimizer's state; `zero3`: as fsdp2, and a
    whole gradient. The last two are DeepSpeed's, for AdamW."""
    vocab_parallel: bool = False
    """Each holds its rows of every teacher's head, with fsdp2 also of the student's and of its
    gradient, and computes their part of the loss of all ranks' tokens. The same steps; for ddp and
    fsdp2, and the reverse KL."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that one may wait for the others."""


class DistillConfig(Config):
    """How the student is distilled; the same for every domain."""

    num_steps: int = Field(default=80, ge=1)
    """Optimizer steps; each one samples, scores and learns once."""
    prompts_per_step: int = Field(default=96, ge=1)
    """One rollout per prompt, over all domains."""
    allocation: AllocationConfig = AllocationConfig()
    """How they are shared out among the domains."""
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
    tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Tokens in memory at once on the learner, padding included, where rows differ much in length;
    one row may have more. Null: rows_per_microbatch alone decides. Never changes the result beyond
    rounding."""
    teacher_samples: TeacherSamplesConfig = TeacherSamplesConfig()
    """Answers of the teachers beside the student's own."""
    kl_to_base: float = Field(default=0.0, ge=0)
    """Weight of the KL to the base, which joins every row's teachers; theirs sum to 1. 0: none."""
    domain_shares: dict[str, float] | None = None
    """Each domain's share of the loss, in any unit and 1 where not named; they are normalised over
    the domains that a step holds. Used by the `domain` denominator."""
    denominator: Literal["domain", "token", "sequence"] = "domain"
    """What a token's KL is divided by. `domain`: the step's tokens of its domain (and multiplied by
    the domain's share); `token`: all tokens of the step; `sequence`: its row's tokens, and the
    number of rows."""
    divergence: DivergenceConfig = DivergenceConfig()
    """What is minimised at each token."""
    learners: LearnersConfig = LearnersConfig()
    """The processes that learn together."""
    endings: EndingsConfig = EndingsConfig()
    """What is learned of rollouts that end in a loop or out of tokens."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    """When a run ends before num_steps."""
    guard: GuardConfig = GuardConfig()
    """Which gradients are not used."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between two step checkpoints; a killed run loses at most that many."""
    num_slots: int = Field(default=64, ge=1)
    """Rollouts that are decoded side by side."""
    num_rollout_workers: int = Field(default=0, ge=0)
    """Processes that sample, beside the learner's, with copies of its weights; 0: the learner's own
    process. Changes speed and memory, never the result."""
    rollout_backend: Literal["engine", "vllm"] = "engine"
    """What rollout workers sample with: `engine`: ours; `vllm`: vLLM, where it is installed; its
    tokens depend on what is sampled beside them (docs/rollout.md)."""
    vllm_options: dict[str, Any] = {}
    """More arguments of `vllm.LLM`, such as tensor_parallel_size."""
    max_staleness: int = Field(default=0, ge=0)
    """Versions by which the weights that sample a step may be older than those that learn it. 0:
    the student samples, then learns. 1: step s + 1 is sampled and scored while step s is learned,
    by the weights from before it; each more lets sampling run one step further ahead, or, with
    partial_rollout_tokens, a rollout go on for one step more. Older tokens are masked. The KL is
    always that of the current weights. The same bits however long anything takes."""
    partial_rollout_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a rollout gets under one version of the weights; one that has not ended pauses
    and goes on under the next version's beside the next step's prompts, and is learned in the step
    in which it ends, so that no step waits for the longest. With max_staleness below the number of
    its parts its first ones are too old by then, and masked. Those of the last step do not pause;
    where a run stops early, what has paused is not learned. Null: each is sampled whole."""
    rollout_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for the next few rollouts of a worker, or for it to take up new weights."""
    num_resident_teachers: int = Field(default=8, ge=1)
    """Teachers in memory at once, besides the next one, which is read meanwhile; the least recently
    used one makes room, LoRA specialists of one base count as one. Changes speed and memory, never
    the result. The learner holds one teacher's head, or those of a token's several teachers."""
    teachers_memory_gb: float | None = Field(default=None, gt=0)
    """Of each worker of the pool, for the teachers in memory: fewer than `num_resident_teachers`
    stay where they would take more, but always one."""
    num_teacher_workers: int = Field(default=1, ge=1)
    """Processes over which each teacher's weights and rows are spread, or as many as the run has
    besides the learner's. Changes speed and memory, never the result."""
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    """What teachers compute and are kept in. The rounding of bfloat16 alone is a KL of about 1e-5
    nats a token."""
    hidden_memory_gb: float = Field(default=1.0, ge=0)
    """Teachers' hidden states that wait for the learner in memory, in GB; the others wait on
    disk."""
    teacher_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds to wait for one teacher to score one step's rows."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between two scores of the student, logged as `score/<domain>` and `score/macro`; the
    first before any step, the last after the last one. 0: none. Changes no weight."""
    evaluate_prompts: int = Field(default=64, ge=1)
    """At most so many held-out prompts of each domain in such a score, the first of its split."""
    evaluate_samples: int = Field(default=1, ge=1)
    """Samples of each of these prompts, at temperature 1 and with the same seeds every time."""

    @property
    def num_steps_ahead(self) -> int:
        """Versions between the weights that sample a step and those that learn it. Partial rollouts
        make steps alike in length: one step ahead then keeps everybody busy, and the rest of
        max_staleness is for rollouts that go on."""
        is_whole = self.partial_rollout_tokens is None
        return self.max_staleness if is_whole else min(self.max_staleness, 1)

    @model_validator(mode="after")
    def the_kl_to_the_base_joins_a_kl(self) -> Self:
        if self.kl_to_base and self.divergence.kind != "reverse_kl":
            raise ValueError(
                f"kl_to_base is {self.kl_to_base:g}, but divergence.kind is "
                f"{self.divergence.kind}, which would be taken of the base too: set kl_to_base to "
                "0, or the kind to reverse_kl"
            )
        return self

    @model_validator(mode="after")
    def a_warmup_ends_before_the_run_and_has_no_base(self) -> Self:
        warmup_steps = self.teacher_samples.warmup_steps
        if warmup_steps >= self.num_steps:
            raise ValueError(
                f"teacher_samples.warmup_steps is {warmup_steps}, and num_steps, which counts "
                f"them, {self.num_steps}: lower the former or raise the latter"
            )
        if warmup_steps and self.kl_to_base:
            raise ValueError(
                f"kl_to_base is {self.kl_to_base:g}, but the {warmup_steps} steps of "
                "teacher_samples.warmup_steps minimise the forward KL, which would be taken of the "
                "base too: set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def zero_cuts_what_muon_needs_whole(self) -> Self:
        strategy, name = self.learners.strategy, self.optimizer.name
        if strategy in ("zero2", "zero3") and name != "adamw":
            raise ValueError(
                f"optimizer.name is {name}, but learners.strategy is {strategy}, whose flat parts "
                "are no matrices: set optimizer.name to adamw, or learners.strategy to fsdp2"
            )
        return self

    @model_validator(mode="after")
    def a_vocabulary_is_shared_out_for_the_reverse_kl(self) -> Self:
        if not self.learners.vocab_parallel:
            return self
        for name, value, allowed in (
            ("learners.strategy", self.learners.strategy, ("ddp", "fsdp2")),
            ("divergence.kind", self.divergence.kind, ("reverse_kl",)),
            ("teacher_samples.warmup_steps", self.teacher_samples.warmup_steps, (0,)),
        ):
            if value not in allowed:
                raise ValueError(
                    f"learners.vocab_parallel is true and {name} {value}: set the latter to "
                    f"{' or '.join(map(str, allowed))}, or the former to false"
                )
        return self

    @model_validator(mode="after")
    def vllm_samples_in_workers(self) -> Self:
        if self.rollout_backend == "vllm" and not self.num_rollout_workers:
            raise ValueError(
                "rollout_backend is vllm and num_rollout_workers 0: vLLM keeps weights of its own; "
                "set num_rollout_workers to 1 or more, or rollout_backend to engine"
            )
        if self.vllm_options and self.rollout_backend != "vllm":
            raise ValueError(
                f"vllm_options are {self.vllm_options}, and rollout_backend is "
                f"{self.rollout_backend}: set it to vllm, or remove the options"
            )
        return self

    @model_validator(mode="after")
    def more_prompts_are_no_more_loss(self) -> Self:
        if self.allocation.by != "even" and self.denominator != "domain":
            raise ValueError(
                f"allocation.by is {self.allocation.by}, but with denominator {self.denominator} a "
                "domain's prompts decide its share of the loss: set denominator to domain, or "
                "allocation.by to even"
            )
        return self

    @model_validator(mode="after")
    def a_gap_in_scores_needs_scores(self) -> Self:
        if self.allocation.by == "score" and not self.evaluate_every:
            raise ValueError(
                "allocation.by is score and evaluate_every 0: the student is then never scored; "
                "set evaluate_every to 10, say, or allocation.by to kl"
            )
        return self

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
    teachers: dict[str, str | dict[str, float]]
    """Domain to its teacher: a stage input such as "specialist/mathematics", or the path of a
    checkpoint relative to the recipe; or several of these, each with its weight."""

    @field_validator("teachers")
    @classmethod
    def weights_are_positive(
        cls, teachers: dict[str, str | dict[str, float]]
    ) -> dict[str, str | dict[str, float]]:
        for domain, mixture in teachers.items():
            if not isinstance(mixture, str):
                check_weights(mixture, of=f"the teachers of {domain}")
        return teachers

    @model_validator(mode="after")
    def every_domain_has_teachers(self) -> Self:
        names = [domain.name for domain in self.domains]
        if sorted(self.teachers) != sorted(names):
            raise ValueError(
                f"teachers names {sorted(self.teachers)}, but the domains are {sorted(names)}: "
                "give teachers for each domain and for no other"
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
    def taught(self) -> dict[str, dict[str, float]]:
        """Each domain's teachers with their weights, which sum to 1."""
        found: dict[str, dict[str, float]] = {}
        for domain, given in self.teachers.items():
            weights = {given: 1.0} if isinstance(given, str) else given
            total = sum(weights.values())
            found[domain] = {name: weight / total for name, weight in weights.items()}
        return found

    @property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """As `taught`, and the base with the weight of the KL to it."""
        found = self.taught
        for weights in found.values() if self.distill.kl_to_base else ():
            weights[BASE] = weights.get(BASE, 0.0) + self.distill.kl_to_base
        return found

    @property
    def teacher_names(self) -> list[str]:
        """All teachers, each once."""
        return sorted({name for mixture in self.mixtures.values() for name in mixture})

    @property
    def shares(self) -> dict[str, float]:
        """Each domain's share of the loss, in any unit, by name."""
        given = self.distill.domain_shares or {}
        return {domain.name: given.get(domain.name, 1.0) for domain in self.domains}
