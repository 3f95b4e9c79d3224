"""Who teaches from which step on: a file that may be edited while the run goes on.

`teachers.yaml` in the stage's folder begins as the recipe has it. It is read again before every
step; an edit holds once its version is higher than the last one's, from the next step on:

    version: 2
    teachers:                     # a domain that is left out rests
      mathematics: specialist/mathematics
      code: {specialist/code: 0.5, checkpoints/coder: 0.5}
    shares: {mathematics: 2}      # of the loss; 1 where not named

`teachers.jsonl` beside it tells which version held from which step, and a resume goes by that. An
edit that cannot be is reported, once, and the run goes on as before.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from distill.config import OpdStage, check_weights
from posttrain.config import Config
from posttrain.errors import PosttrainError
from posttrain.files import write_atomic

log = logging.getLogger(__name__)

EDITED, RECORDED = "teachers.yaml", "teachers.jsonl"

HEADER = """\
# Who teaches. May be edited while the stage runs: raise the version, and it holds from the next
# step on. A teacher is an input of the stage or a folder relative to the recipe: a checkpoint, or a
# LoRA adapter. A domain that is left out rests; a mixture is {teacher: weight, ...}; shares are of
# the loss, 1 where not named. Mistakes are told in log.txt and change nothing.
"""


class Roster(Config):
    """The teachers of one version."""

    version: int = Field(ge=1)
    teachers: dict[str, str | dict[str, float]] = Field(min_length=1)
    """As in the stage's config."""
    shares: dict[str, float] | None = None
    """Each domain's share of the loss, in any unit and 1 where not named."""

    @field_validator("shares")
    @classmethod
    def shares_are_positive(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is not None:
            check_weights(shares, of="shares")
        return shares


@dataclass(frozen=True, slots=True)
class Entry:
    """`Entry(step=12, roster)`: the roster holds from step 12 on."""

    step: int
    roster: Roster


def roster_at(history: Sequence[Entry], step: int) -> Roster:
    """The one that holds in a step; the history is in order of steps and begins at 0."""
    return next(entry.roster for entry in reversed(history) if entry.step <= step)


def apply(roster: Roster, stage: OpdStage) -> OpdStage:
    """The stage as this roster has it, with the domains that do not rest. Raises ValueError where
    it names others, or weights that cannot be."""
    known = [domain.name for domain in stage.domains]
    if unknown := sorted(roster.teachers.keys() - set(known)):
        raise ValueError(
            f"teachers names the domains {unknown}, and the stage's are {known}: correct them; a "
            "run's domains are its recipe's"
        )
    return OpdStage.model_validate(
        {
            "domains": [domain for domain in stage.domains if domain.name in roster.teachers],
            "distill": stage.distill.model_copy(update={"domain_shares": roster.shares}),
            "teachers": roster.teachers,
        }
    )


class Rosters:
    """A stage's rosters: read, checked, recorded."""

    def __init__(
        self,
        stage: OpdStage,
        folder: Path,
        *,
        hire: Callable[[Iterable[str]], None],
        begun: int = -1,
    ) -> None:
        """`hire` checks teachers and makes them known; it raises PosttrainError for one that cannot
        teach. `begun` is the newest step that an earlier attempt began to sample: no edit holds
        before the one after it."""
        self._stage = stage
        self._hire = hire
        self._begun = begun
        self._edited, self._recorded = folder / EDITED, folder / RECORDED
        self._reported = ""
        self.history = read_history(self._recorded)
        if not self.history:
            given = stage.distill.domain_shares
            first = Roster(version=1, teachers=stage.teachers, shares=given)
            self.history = [Entry(0, first)]
            write_atomic(self._recorded, lines(self.history))
        if not self._edited.exists():
            newest = self.history[-1].roster.model_dump(mode="json", exclude_none=True)
            write_atomic(self._edited, HEADER + yaml.safe_dump(newest, sort_keys=False))

    def at(self, step: int) -> tuple[OpdStage, int]:
        """The stage as it is in this step, its teachers hired, and the roster's version.

        Raises PosttrainError where a teacher that taught in this step before is not there any more.
        """
        if step > max(self.history[-1].step, self._begun) and (new := self._news()) is not None:
            self.history.append(Entry(step, new))
            write_atomic(self._recorded, lines(self.history))
            log.info("version %d of %s holds from step %d on", new.version, self._edited, step)
        roster = roster_at(self.history, step)
        now = apply(roster, self._stage)
        self._hire(now.teacher_names)
        return now, roster.version

    def _news(self) -> Roster | None:
        """A newer roster that can be; what is wrong with one that cannot is reported."""
        try:
            text = self._edited.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return self._report(str(error), str(error))
        try:
            new, last = read_roster(text), self.history[-1].roster
            if new == last:
                return None
            if new.version <= last.version:
                raise ValueError(
                    f"its version is {new.version}, and version {last.version} holds already: "
                    f"raise it above {last.version}"
                )
            self._hire(apply(new, self._stage).teacher_names)
        except (PosttrainError, ValueError, yaml.YAMLError) as error:
            return self._report(text, in_words(error))
        return new

    def _report(self, text: str, problem: str) -> None:
        if text != self._reported:
            log.warning("%s is left out of account until it is mended: %s", self._edited, problem)
        self._reported = text


def read_roster(text: str) -> Roster:
    """Raises ValidationError or yaml.YAMLError."""
    return Roster.model_validate(yaml.safe_load(text))


def read_history(path: Path) -> list[Entry]:
    """What was recorded; empty where nothing was."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Entry(record.pop("step"), Roster.model_validate(record)) for record in records]


def lines(history: Iterable[Entry]) -> str:
    """`{"step": 12, "version": 2, "teachers": {...}, "shares": null}`, one a line."""
    records: list[dict[str, Any]] = [
        {"step": entry.step, **entry.roster.model_dump(mode="json")} for entry in history
    ]
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def in_words(error: Exception) -> str:
    """One line."""
    if isinstance(error, ValidationError):
        parts = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        return "; ".join(f"{field}: {message}" if field else message for field, message in parts)
    return " ".join(str(error).split())
