"""What a recipe says about a domain and its data."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config import Config, Effort
from posttrain.judge_config import REWARD, JudgeConfig
from rewards.environments import tools_of

SOURCES = ("jsonl", "parquet", "hub", "reasoning_gym", "python")


class SourceConfig(Config):
    """One source of rows."""

    kinds: ClassVar[tuple[str, ...]] = SOURCES

    jsonl: str | None = None
    """A file with one JSON object a line; relative to the recipe."""
    parquet: str | None = None
    """A Parquet file; relative to the recipe."""
    hub: str | None = None
    """A data set's id on the Hugging Face hub."""
    subset: str | None = None
    """The configuration of `hub`."""
    split: str | None = None
    """The split of `hub`; null: train."""
    reasoning_gym: dict[str, Any] | None = None
    """A reasoning-gym generator: `task`, `size`, maybe `seed`, and the task's own settings."""
    python: str | None = None
    """A function of yours, `module:function`, that yields rows; the recipe's folder comes first."""
    args: dict[str, Any] = {}
    """Keyword arguments of `python`; a parameter `seed` is filled in from the run's seed."""
    columns: dict[str, str] = {}
    """Other names for fields, such as `{prompt: question}` where the data calls it `question`."""
    convert: str | None = None
    """A function, `module:function`, that makes a row of each raw one, or leaves it out by
    returning null; `posttrain.domains.public` has those of public data sets."""
    limit: int | None = Field(default=None, ge=1)
    """The first rows only; null: all."""
    streaming: bool = False
    """Read no more rows than a stage needs, from the first one on, instead of all: for data that
    does not fit in memory, or on the hub. Its order is the data's own: shuffle it beforehand.
    What is checked before a run are the first 1000."""

    @model_validator(mode="after")
    def exactly_one_source(self) -> Self:
        given = [name for name in self.kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(self.kinds)} says where rows come from, found "
                f"{' and '.join(given) or 'none'}: keep one"
            )
        return self

    @model_validator(mode="after")
    def options_go_with_their_source(self) -> Self:
        for option, source in (("subset", "hub"), ("split", "hub"), ("args", "python")):
            if getattr(self, option) and getattr(self, source) is None:
                raise ValueError(f"{option} belongs to {source}: remove it, or use {source}")
        return self

    @model_validator(mode="after")
    def what_is_generated_to_a_size_is_not_streamed(self) -> Self:
        if self.streaming and self.reasoning_gym is not None:
            raise ValueError("streaming is for jsonl, parquet, hub and python: remove it")
        return self

    @field_validator("reasoning_gym")
    @classmethod
    def generator_is_named(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("task"), str):
            raise ValueError("reasoning_gym needs a task: write {task: gcd, size: 1000}")
        return value

    @property
    def source(self) -> str:
        """The one source given, such as `jsonl train.jsonl`, for messages."""
        name = next(name for name in self.kinds if getattr(self, name) is not None)
        value = getattr(self, name)
        of = {"reasoning_gym": lambda: value["task"], "mixture": lambda: f"of {len(value)}"}
        return f"{name} {of.get(name, lambda: value)()}"


class PartConfig(SourceConfig):
    """A source in a mixture."""

    weight: float = Field(default=1.0, gt=0)
    """Its share of the rows that SFT learns and of the prompts that GRPO visits, in any unit."""


class DataConfig(SourceConfig):
    """Where rows come from: exactly one of `jsonl`, `parquet`, `hub`, `reasoning_gym`, `python` and
    `mixture`.

    A row is `{"prompt": text}` or `{"messages": [...]}` (roles: system, user, assistant, tool, in
    DeepSeek-V4's format also developer and latest_reminder), and may have a `response` (text,
    reasoning in `<think>...</think>` in front) or a `demonstration` (assistant and tool messages).
    Its other fields, such as `answer`, go to the reward and to the tools.
    """

    kinds: ClassVar[tuple[str, ...]] = (*SOURCES, "mixture")

    mixture: list[PartConfig] | None = Field(default=None, min_length=1)
    """Several sources with weights, each with its own columns, convert and limit. Rows come in
    turn, each source by its weight as long as it lasts."""

    @model_validator(mode="after")
    def a_mixtures_parts_have_their_own_settings(self) -> Self:
        if self.mixture is None:
            return self
        if given := [name for name in ("columns", "convert", "limit") if getattr(self, name)]:
            raise ValueError(f"{given[0]} is a part's: move it into the mixture's sources")
        if any(part.streaming for part in self.mixture):
            raise ValueError("streaming is the whole mixture's: write it beside mixture")
        if self.streaming and any(part.reasoning_gym is not None for part in self.mixture):
            raise ValueError("streaming is for jsonl, parquet, hub and python: remove it")
        return self

    @property
    def parts(self) -> Sequence[SourceConfig]:
        """The sources: those of the mixture, or the one that this is."""
        return self.mixture or [self]

    @property
    def shares(self) -> list[float]:
        """Of the parts, by their weights; their sum is 1."""
        weights = [part.weight for part in self.mixture or ()] or [1.0]
        return [weight / sum(weights) for weight in weights]


class ToolConfig(Config):
    """A tool the model may call."""

    python: str
    """`module:function`, called as `function(name, arguments, **row)`; it returns text. Of the row
    it gets the fields that its parameters name, or all of them as `**row`."""
    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")
    """What the model calls it."""
    description: str = ""
    """What it does, for the prompt."""
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    """The JSON schema of its arguments."""
    in_prompt: bool = True
    """Whether the prompt introduces it; a small model may learn it from demonstrations instead."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Seconds for one call; the answer to one that takes longer is an error."""


class DecontaminateConfig(Config):
    """Which prompts are too near to a test's to be trained on."""

    num_words: int = Field(default=8, ge=1)
    """Prompts are compared by their runs of so many words; a shorter one is one run."""
    max_overlap: float = Field(default=0.5, ge=0, lt=1)
    """The share of runs, of the one of two prompts that has fewer, that they may have in common."""
    against: dict[str, DataConfig] = {}
    """Tests besides the domain's own held-out prompts, by name."""


class DomainSpec(Config):
    """What every stage that samples from a domain, scores it or learns from it needs."""

    name: str
    """The domain's name in reports."""
    data: DataConfig
    """Its rows."""
    reward: str | dict[str, float]
    """A name from `rewards`, `judge`, `module:function` of yours, or several with weights."""
    judge: JudgeConfig | None = None
    """Who gives the reward `judge`; null: nobody."""
    environment: Literal["calculator", "database", "files", "store"] | None = None
    """A simulated world in place of `tools`; a row's `environment` says what it starts from, as
    `{kind: store, start: {city: Oslo}}`. The `tools` reward sees where it ends."""
    environment_in_prompt: bool = True
    """Introduce that world's tools in every prompt; false for a model that knows them."""
    tools: list[ToolConfig] = []
    """What the model may call."""
    effort: Effort = "none"
    """How long the model thinks: not at all, at length, or at any length."""
    system: str | None = None
    """A system prompt put in front of every row."""
    heldout_share: float = Field(default=0.125, gt=0, lt=1)
    """The share of prompts, chosen by their content's hash, that is only evaluated on."""
    exclude_share: float | None = Field(default=None, gt=0, lt=1)
    """Prompts up to this share of the hash's range are kept out of training, because another domain
    may hold them out; null: those up to heldout_share."""
    decontaminate: DecontaminateConfig | None = None
    """Leave prompts out of training that say nearly what a test's say, and count them; null: only
    those that say the same."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Bounds a whole answer in tokens, the tools' results and further turns included."""
    reward_options: dict[str, Any] = {}
    """Keyword arguments of the reward for every row, such as `{sandbox: landlock}` or `{partial:
    true}`; a row's own fields of these names come before them, but for `sandbox`."""
    reward_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds for one answer's reward; one that takes longer scores 0."""

    @field_validator("tools")
    @classmethod
    def tools_have_different_names(cls, value: list[ToolConfig]) -> list[ToolConfig]:
        names = [tool.name for tool in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two tools are called {twice!r}: rename one")
        return value

    @model_validator(mode="after")
    def what_is_compared_is_read_whole(self) -> Self:
        if self.decontaminate is not None and self.data.streaming:
            raise ValueError(
                "decontaminate compares with every held-out prompt, and streaming reads a few of "
                "them only: remove one of the two"
            )
        return self

    @field_validator("reward")
    @classmethod
    def some_reward_counts(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if not value or (isinstance(value, dict) and not any(value.values())):
            raise ValueError(
                f"found {value!r}: name a reward, or several with weights other than 0"
            )
        return value

    @model_validator(mode="after")
    def an_environment_brings_its_own_tools(self) -> Self:
        if self.environment is not None and self.tools:
            raise ValueError(f"environment {self.environment} has tools of its own: remove tools")
        return self

    @model_validator(mode="after")
    def the_judge_is_asked(self) -> Self:
        if (REWARD in self.reward_weights) == (self.judge is not None):
            return self
        raise ValueError(
            f"judge says who judges, and reward {self.reward!r} asks nobody: name judge in reward, "
            "as {judge: 1, ...}, or remove the section"
            if self.judge
            else f"reward {self.reward!r} asks a judge: add the section judge, such as "
            "{checkpoint: actor}"
        )

    @property
    def prompt_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt introduces, as the model reads them."""
        if self.environment is not None:
            return tools_of(self.environment) if self.environment_in_prompt else []
        told = {"name", "description", "parameters"}
        return [tool.model_dump(include=told) for tool in self.tools if tool.in_prompt]

    def reward_fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the reward is given of a row: its fields, and `reward_options` where it has none.
        How weak a sandbox may be is for the recipe alone to say, never for the data."""
        world = {} if self.environment is None else {"environment": {"kind": self.environment}}
        own = {name: value for name, value in row.items() if name != "sandbox"}
        return {**world, **self.reward_options, **own}

    @property
    def untrained_share(self) -> float:
        """The share of the hash's range that training keeps out of."""
        return max(self.heldout_share, self.exclude_share or 0.0)

    @property
    def reward_weights(self) -> dict[str, float]:
        """The rewards with their weights; one without is 1."""
        return {self.reward: 1.0} if isinstance(self.reward, str) else self.reward

    @property
    def graded_rewards(self) -> dict[str, float]:
        """Those that are functions: all but the judge."""
        return {name: weight for name, weight in self.reward_weights.items() if name != REWARD}
