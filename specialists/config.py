"""What a recipe says about pretraining, SFT and GRPO. Imports no torch: recipes need it.

A `...Config` is what the recipe holds; a `...Stage` is what the stage's `work(config, job)` gets.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import Config, Effort, OptimizerConfig
from posttrain.domains import DataConfig, DomainSpec

Loss = Literal["assistant", "completion", "all"]


class SupervisedConfig(Config):
    """What pretraining and SFT share: rows of prompt and response, learned by cross entropy."""

    num_steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows in one optimizer step; the loss is the mean over the step's loss tokens."""
    rows_per_microbatch: int | None = Field(default=None, ge=1)
    """Rows in memory at once, a divisor of rows_per_step; null: all. A step's rows are sorted by
    length first, so that smaller microbatches hold less padding. Changes speed and memory only."""
    packing: bool = False
    """Lay a microbatch's rows end to end in one row without padding, which the model reads as
    documents of their own, and share a step's rows out so that microbatches have equally many
    tokens: rows_per_step and the order of steps stay, rows_per_microbatch becomes a mean. Changes
    speed and memory only; V4 computes no padding either way."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    """The optimizer and its schedule."""
    max_length: int | None = Field(default=None, ge=2)
    """Longer rows (tokens, prompt included) are left out and counted; null: the model's context."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between two step checkpoints; a killed run loses at most that many."""

    @model_validator(mode="after")
    def microbatches_fill_a_step(self) -> Self:
        part = self.rows_per_microbatch
        _divides("rows_per_microbatch", part, "rows_per_step", self.rows_per_step)
        return self

    @property
    def microbatches(self) -> int:
        """Microbatches in one optimizer step."""
        return self.rows_per_step // (self.rows_per_microbatch or self.rows_per_step)


class MixtureConfig(Config):
    """One source of pretraining rows."""

    data: DataConfig
    """Where its rows come from; each needs a response or a demonstration."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the rows drawn, in any unit: shares are normalised over the mixture."""
    domain: str | None = None
    """The domain whose system prompt and tools its prompts are rendered with; null: none."""
    effort: Effort | None = None
    """The effort its prompts are rendered with; null: the domain's, or `none`."""

    @model_validator(mode="after")
    def a_mixture_is_flat(self) -> Self:
        if self.data.mixture:
            raise ValueError("data has a mixture of its own: make its parts sources of this one")
        return self


class PretrainConfig(SupervisedConfig):
    """How a preset's weights are trained from nothing."""

    mixture: list[MixtureConfig] = Field(min_length=1)
    """The data. Every prompt that is held out in a domain is taken out of it."""
    loss: Loss = "assistant"
    """Which tokens are learned: `assistant`, those of all its turns with their end marks, earlier
    ones in the prompt included; `completion`, those of the response alone; `all`, every token, what
    users and tools said too."""


class LoraConfig(Config):
    """A LoRA adapter in place of the whole model (PEFT)."""

    rank: int = Field(default=16, ge=1)
    """Columns of each factor."""
    alpha: int = Field(default=32, ge=1)
    """The product of the factors is scaled by alpha / rank."""
    targets: str = r".*self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)"
    """A regular expression that whole module names match; V4's attention projections."""
    experts: bool = False
    """Adapt V4's routed experts too, which are parameters and no modules."""


class ScoreConfig(Config):
    """Answers to prompts that are kept out of the training, graded by their domain's reward."""

    num_prompts: int | None = Field(default=64, ge=1)
    """Validation prompts of each domain that are answered, the first by their hash; null: all."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Answers to each, every time under the same seeds."""
    temperature: float = Field(default=0.0, ge=0)
    """The sampling's temperature; 0 is greedy."""
    num_slots: int = Field(default=64, ge=1)
    """Answers that are decoded side by side."""


class TuningConfig(SupervisedConfig):
    """What SFT on demonstrations and on own answers share."""

    num_steps: int = Field(default=10, ge=1)
    """Optimizer steps."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)
    """The optimizer and its schedule."""
    lora: LoraConfig | None = None
    """Train an adapter, which is the stage's result; teachers that adapt one base share it in
    memory. null: the whole model."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of the rows, chosen by their prompts' hash, that are kept out of training to choose
    the result by: the weights that do `best_by` on them. 0: the last weights."""
    validate_every: int = Field(default=10, ge=1)
    """Steps between two losses on them, logged as `validation_loss`; the last step has one too."""
    score: ScoreConfig | None = None
    """Sample and grade answers to their prompts at these steps too, logged as `validation_score`,
    the mean over domains; null: the loss alone."""
    best_by: Literal["loss", "score"] = "loss"
    """Which weights are the result: at the lowest loss, or at the highest score, of equal ones that
    at the lower loss. Prompts that are held out for evaluation choose nothing."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between two step checkpoints; a killed run loses at most that many."""

    @model_validator(mode="after")
    def scores_have_prompts(self) -> Self:
        if self.score and not self.validation_share:
            raise ValueError("score is of the rows of validation_share, which is 0: raise it")
        if self.best_by == "score" and not self.score:
            raise ValueError(
                "best_by is score, and score is null: write score: {}, or best_by loss"
            )
        return self


class SftConfig(TuningConfig):
    """Supervised training on a domain's demonstrations."""

    num_demonstrations: int | None = Field(default=None, ge=1)
    """Demonstrations used of each domain, chosen from its train split by their hash; null: all."""
    loss: Loss = "assistant"
    """Which tokens are learned: `assistant`, those of all its turns with their end marks, earlier
    ones in the prompt included; `completion`, those of the response alone; `all`, every token, what
    users and tools said too."""


class BestOfConfig(TuningConfig):
    """Supervised training on a specialist's own answers, the best of several to each prompt
    (rejection sampling). The domain's last stage so far (`grpo`, `sft` or the base) answers."""

    start: Literal["base", "specialist"] = "base"
    """Who learns: the base, afresh (DeepSeek-R1), or the specialist that answered."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Prompts that are answered, chosen from the domain's train split by their hash; null: all."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Answers sampled to each prompt."""
    keep_per_prompt: int = Field(default=1, ge=1)
    """The best so many different answers are learned, by reward, then the shorter first."""
    min_reward: float = 1.0
    """Answers with a lower reward are not learned; prompts that are left without one are counted.
    Nor are answers that max_new_tokens cut."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling's temperature."""
    num_slots: int = Field(default=128, ge=1)
    """Answers that are decoded side by side."""
    loss: Literal["completion", "all"] = "completion"
    """Which tokens are learned: those that were sampled, or the prompt's and the tools' too."""

    @model_validator(mode="after")
    def no_more_are_kept_than_sampled(self) -> Self:
        if self.keep_per_prompt > self.samples_per_prompt:
            raise ValueError(
                f"keep_per_prompt is {self.keep_per_prompt}, and samples_per_prompt only "
                f"{self.samples_per_prompt}: lower the first or raise the second"
            )
        return self


class LengthPenalty(Config):
    """What an answer's length costs at effort b, less for more effort (DeepSeek-V4.1):

    -min(cap, k(b) * tokens / max_new_tokens), k(b) = k * exp(-(b - 1) / tau)

    Effort `none` counts as b = 1, `high` as 50 and `max` as 100.
    """

    k: float = Field(default=0.2, gt=0)
    """What an answer of max_new_tokens costs at effort 1, in units of the reward."""
    tau: float = Field(default=30.0, gt=0)
    """By so much more effort the cost falls to 1/e."""
    cap: float = Field(default=0.5, gt=0)
    """No answer costs more."""


class CurriculumConfig(Config):
    """Visit prompts again whose answers were neither all right nor all wrong."""

    fresh_share: float = Field(default=0.5, ge=0, le=1)
    """The share of visits, at least, that go to prompts that were not visited yet, as long as there
    are any. The others go to those whose group had different rewards when they were last
    visited."""


class GrpoConfig(Config):
    """Reinforcement on a domain's reward: advantage = reward - the mean of the prompt's group."""

    num_steps: int = Field(default=50, ge=1)
    """Optimizer steps."""
    steps_per_sampling: int = Field(default=1, ge=1)
    """Optimizer steps whose answers are sampled at once, by the weights before the first. 1: every
    step is on-policy. More: the later ones are not, and `clip_low`, `clip_high`, `max_ratio` and
    `off_policy_mask` bound by how much."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts in one step, spread evenly over the stage's domains."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """Answers sampled to each prompt: the group whose mean reward is the baseline."""
    rows_per_microbatch: int | None = Field(default=None, ge=1)
    """Answers in memory at once, a divisor of a step's; null: all. Changes speed and memory."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling's temperature and the loss's, which have to be one."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens of this mass; the loss is over the same ones. 1: all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many of the likeliest tokens; the loss is over the same ones. 0: all."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio p / p(sampled) is of no more use below 1 minus this."""
    clip_high: float = Field(default=0.28, gt=0)
    """The ratio is of no more use above 1 plus this: higher than `clip_low`, so that what is
    unlikely may become likely (DAPO)."""
    max_ratio: float | None = Field(default=None, gt=1)
    """A token whose ratio is above this or below its inverse carries no gradient; the share is
    logged as `tokens_masked`. null: none is."""
    off_policy_mask: float | None = Field(default=None, gt=0)
    """A worse than average answer whose mean of log p(sampled) / p is above this, in nats a token,
    is left out (DeepSeek-V3.2); the share is logged as `rows_masked`. null: none is."""
    keep_routing: bool = False
    """Learn each token with the experts that sampled it (V4 models; DeepSeek-V3.2)."""
    mask_truncated: bool = False
    """Answers that max_new_tokens cut carry no loss; their reward stays in the group's mean."""
    length_penalty: LengthPenalty | None = None
    """Taken from the reward that trains, not from the one that is logged and evaluated; null: none.
    Groups have one prompt and one effort, so rewards are centred within both."""
    curriculum: CurriculumConfig | None = None
    """Which prompts are visited; null: all in turn."""
    refill_rounds: int = Field(default=0, ge=0)
    """How often a group whose answers all earn the same, which teach nothing, makes room for one of
    another prompt; 0: never."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference; 0 keeps none in memory."""
    reference_every: int | None = Field(default=None, ge=1)
    """Steps after which the policy becomes the reference; null: it stays the checkpoint that the
    stage started from."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)
    """The optimizer and its schedule."""
    lora: LoraConfig | None = None
    """Train an adapter, which is the stage's result: a fresh one or, after SFT's, that one further.
    The reference of `kl_weight` is what the stage started from. null: the whole model."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between two step checkpoints; a killed run loses at most that many."""
    num_slots: int = Field(default=128, ge=1)
    """Answers that are decoded side by side."""

    @model_validator(mode="after")
    def microbatches_fill_a_step(self) -> Self:
        part, whole = self.rows_per_microbatch, "prompts_per_step x samples_per_prompt"
        _divides("rows_per_microbatch", part, whole, self.rows_per_step)
        return self

    @model_validator(mode="after")
    def samplings_fill_a_checkpoint(self) -> Self:
        part, whole = self.steps_per_sampling, self.checkpoint_every
        _divides("steps_per_sampling", part, "checkpoint_every", whole)  # answers are not kept
        return self

    @model_validator(mode="after")
    def the_reference_is_used(self) -> Self:
        if self.reference_every and not self.kl_weight:
            raise ValueError(
                f"reference_every is {self.reference_every}, and kl_weight 0 uses no reference: "
                "set kl_weight above 0, or reference_every to null"
            )
        return self

    @property
    def num_visits(self) -> int:
        """Prompts that are answered, those of a last sampling beyond num_steps included."""
        num_samplings = -(-self.num_steps // self.steps_per_sampling)
        return num_samplings * self.steps_per_sampling * self.prompts_per_step

    @property
    def rows_per_step(self) -> int:
        """Answers in one optimizer step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def microbatches(self) -> int:
        """Microbatches in one optimizer step."""
        return self.rows_per_step // (self.rows_per_microbatch or self.rows_per_step)


class PretrainStage(Config):
    """A base made from nothing."""

    preset: Literal["tiny", "small"]
    """The model's size."""
    pretrain: PretrainConfig
    """Its training."""
    domains: list[DomainSpec] = []
    """Whose held-out prompts stay out of the training, and whom the mixture may name."""

    @model_validator(mode="after")
    def the_mixture_names_domains(self) -> Self:
        known = {domain.name for domain in self.domains}
        known |= {name.partition("@")[0] for name in known}
        for source in self.pretrain.mixture:
            if source.domain is not None and source.domain not in known:
                raise ValueError(
                    f"the mixture names domain {source.domain!r}, which is none of "
                    f"{', '.join(sorted(known)) or 'no domains'}: correct it or leave it out"
                )
        return self


class ExistingStage(Config):
    """A base that exists already: exactly one of `path` and `hub`."""

    path: str | None = None
    """A folder with a transformers checkpoint, relative to the recipe."""
    hub: str | None = None
    """A model id of the Hugging Face hub."""
    revision: str | None = None
    """The commit, tag or branch of `hub`."""

    @model_validator(mode="after")
    def exactly_one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("exactly one of path and hub says where the base comes from")
        return self


class SftStage(Config):
    """Supervised training from `start`; several domains: the `mixed` baseline."""

    domains: list[DomainSpec] = Field(min_length=1)
    """Whose demonstrations are learned."""
    sft: SftConfig
    """How."""


class BestOfStage(Config):
    """Supervised training of `start` on the best answers of `sampler`."""

    domain: DomainSpec
    """Whose prompts are answered."""
    best_of: BestOfConfig
    """How."""


class GrpoStage(Config):
    """Reinforcement from `start`; several domains: the `mixed` baseline."""

    domains: list[DomainSpec] = Field(min_length=1)
    """Whose prompts are answered and rewarded."""
    grpo: GrpoConfig
    """How."""


def _divides(part_name: str, part: int | None, whole_name: str, whole: int) -> None:
    if part is not None and whole % part:
        raise ValueError(
            f"{part_name} is {part}, which does not divide {whole} ({whole_name}): use a divisor"
        )
