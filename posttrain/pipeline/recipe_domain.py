"""What a recipe says about one domain. Imports no torch."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config import Config, Effort
from posttrain.domains import DomainSpec
from specialists.config import BestOfConfig, GrpoConfig, SftConfig


class EffortConfig(Config):
    """What a domain has of its own at one effort."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Bounds a whole answer in tokens; null: as the domain does."""


class DomainConfig(DomainSpec):
    """One domain: its prompts, its reward, and how its specialist is made."""

    name: str = ""
    """Filled in from the domain's key in the recipe; leave it out."""
    efforts: list[Effort] | dict[Effort, EffortConfig] = []
    """One specialist per effort, called `<domain>@<effort>`; empty: one, with `effort`. As a
    mapping, with what is an effort's own."""
    sft: SftConfig | None = None
    """Supervised training on the domain's demonstrations; null: none."""
    grpo: GrpoConfig | None = None
    """Reinforcement on the domain's reward, after `sft` if there is one; null: none."""
    best_of: BestOfConfig | None = None
    """Supervised training on the best of the specialist's own answers, after `sft` and `grpo` if
    there are any; null: none."""

    bad_gold: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    """Rows known to be bad: before training every row's gold answer is graded, and answers that are
    wrong on purpose, and more rows than this whose gold does not score 1, or something wrong does,
    end the run. `all`: none end it, as for a reward that gives no gold 1. They are counted, and
    trained on."""

    @field_validator("efforts")
    @classmethod
    def efforts_differ(
        cls, value: list[Effort] | dict[Effort, EffortConfig]
    ) -> list[Effort] | dict[Effort, EffortConfig]:
        if isinstance(value, list):
            refuse_twice(value)
        return value

    @model_validator(mode="after")
    def an_adapter_is_trained_further_as_it_is(self) -> Self:
        goes_on = self.best_of if self.best_of and self.best_of.start == "specialist" else None
        given = {"sft": self.sft, "grpo": self.grpo, "best_of": goes_on}
        stages = [(name, how.lora) for name, how in given.items() if how]
        for (before, found), (after, wanted) in pairwise(stages):
            if found and wanted and found != wanted:
                raise ValueError(
                    f"{after} trains the adapter of {before} further, and their lora differ: give "
                    f"both the same, or {after} none, which trains the whole model"
                )
        return self

    @property
    def by_effort(self) -> dict[Effort, Self]:
        """The domain at each of its efforts."""
        own = self.efforts if isinstance(self.efforts, dict) else {}
        return {
            effort: self.model_copy(
                update={
                    "effort": effort,
                    "efforts": [],
                    "max_new_tokens": (own.get(effort) or EffortConfig()).max_new_tokens
                    or self.max_new_tokens,
                }
            )
            for effort in self.efforts or [self.effort]
        }

    @property
    def is_trained(self) -> bool:
        """Whether the domain has a specialist of its own."""
        return bool(self.sft or self.grpo or self.best_of)

    @property
    def spec(self) -> DomainSpec:
        """The domain without its training: what every stage that samples or scores needs."""
        return DomainSpec(**{name: getattr(self, name) for name in DomainSpec.model_fields})


def refuse_twice(values: Sequence[str | int]) -> None:
    """Raise ValueError on a value that is there twice."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is given twice: keep one")
