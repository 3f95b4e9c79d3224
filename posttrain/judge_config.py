"""What a recipe says about a domain's judge. Imports no torch: recipes need it."""

from typing import Self

from pydantic import Field, model_validator

from posttrain.config import Config, Effort

REWARD = "judge"
"""The name of the reward that is the judge's verdict."""

ACTOR = "actor"
SPECIALIST = "specialist/"


class JudgeConfig(Config):
    """A model that judges answers by a rubric; its verdict, 0 to 1, is the reward `judge`."""

    checkpoint: str
    """A folder with a checkpoint or an adapter, relative to the recipe; `specialist/<domain>`, one
    that this recipe makes; or `actor`: the model that answers, as it is at that step of GRPO, or as
    best_of samples from it. Evaluations and validation scores, which compare models, then take the
    base."""
    rubric: str = "rubric"
    """The row's field with the rubric; `reward_options` may hold one for all rows."""
    reference: str | None = None
    """The row's field with an answer to compare with, which the judge is shown; `response` is the
    demonstration. null: none."""
    pairs: bool = False
    """Ask which is better, the answer or the reference, in both orders: a vote is the mean of the
    two. false: ask for a score."""
    low: int = Field(default=1, ge=0)
    """The score that is worth 0."""
    high: int = Field(default=10, ge=1)
    """The score that is worth 1."""
    votes: int = Field(default=1, ge=1)
    """Verdicts sampled for each answer; their mean counts. One that cannot be read is left out, and
    counted; an answer without any has no reward."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Bounds what the judge writes, in its own tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """The temperature of its sampling; 0 is greedy."""
    effort: Effort = "none"
    """How long it thinks first."""
    system: str | None = None
    """What it is told first, in place of our words; how its verdict has to end follows in any
    case."""
    num_slots: int = Field(default=64, ge=1)
    """Verdicts that are decoded side by side. Changes speed and memory, never the result."""

    @model_validator(mode="after")
    def the_scale_has_two_ends(self) -> Self:
        if self.low >= self.high:
            raise ValueError(
                f"low is {self.low} and high {self.high}: a better answer needs a higher score"
            )
        return self

    @model_validator(mode="after")
    def pairs_have_a_reference(self) -> Self:
        if self.pairs and self.reference is None:
            raise ValueError(
                "pairs compares each answer with a reference: name the row's field in reference"
            )
        return self

    @model_validator(mode="after")
    def votes_may_differ(self) -> Self:
        if self.votes > 1 and not self.temperature:
            raise ValueError(
                f"votes is {self.votes} and temperature 0: all of them would be the same; raise "
                "temperature, or ask for one"
            )
        return self

    @property
    def specialist(self) -> str | None:
        """The specialist of this recipe that judges; None where none does."""
        is_one = self.checkpoint.startswith(SPECIALIST)
        return self.checkpoint.removeprefix(SPECIALIST) if is_one else None

    @property
    def folder(self) -> str | None:
        """The folder of the checkpoint; None where it is no file yet."""
        return None if self.checkpoint == ACTOR or self.specialist else self.checkpoint
