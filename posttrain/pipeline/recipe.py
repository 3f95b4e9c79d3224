"""The recipe: everything a run is told, in one frozen pydantic model. Imports no torch.

    base ──> sft/<domain> ──> grpo/<domain> ──> best_of/<domain> ──> distill ──> evaluate ──> report
                       (a domain's last stage is its specialist, and its teacher)

Paths inside a recipe are relative to the recipe's file. Reading one from YAML is recipe_file.py;
what can be wrong beyond its types (data, rewards, teachers) is checks.py.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationError, field_validator, model_validator

from distill.config import DistillConfig, check_weights
from posttrain.config import Config
from posttrain.evaluate_config import EvaluateConfig
from posttrain.merge_config import MergeStage
from posttrain.pipeline.recipe_domain import DomainConfig, refuse_twice
from specialists.config import GrpoConfig, PretrainConfig, SftConfig

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


Baseline = Literal["average", "ties", "mixed"]


class FieldError(ValueError):
    """What a check of the whole recipe found wrong with one field, so that its line is known."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, mapping by mapping."""
    both = {
        key: overlaid(below[key], value)
        for key, value in above.items()
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
    }
    return {**below, **above, **both}


def _numbered(mixture: Mapping[str, float]) -> list[tuple[int, tuple[str, float]]]:
    return list(enumerate(mixture.items(), start=1))


def _role(domain: str, number: int, name: str) -> str:
    is_stage = name == "base" or name.startswith("specialist/")
    return name if is_stage else f"teacher/{domain}.{number}"


class BaseConfig(Config):
    """Where the base checkpoint comes from: exactly one of `preset`, `path` and `hub`."""

    preset: Literal["tiny", "small"] | None = None
    """A V4 of this size, made from nothing and trained on `pretrain`."""
    pretrain: PretrainConfig | None = None
    """The preset's training: its mixture, steps and optimizer."""
    path: str | None = None
    """A folder with a transformers checkpoint, its tokenizer included."""
    hub: str | None = None
    """A model id of the Hugging Face hub."""
    revision: str | None = None
    """The commit, tag or branch of `hub`."""

    @model_validator(mode="after")
    def exactly_one_source(self) -> Self:
        given = [name for name in ("preset", "path", "hub") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of preset, path and hub says where the base comes from, found "
                f"{' and '.join(given) or 'none'}: keep one"
            )
        if (self.preset is None) != (self.pretrain is None):
            raise ValueError(
                "preset and pretrain go together, since a preset's weights are made from nothing: "
                + ("add pretrain" if self.preset else "remove pretrain, or use a preset")
            )
        if self.revision is not None and self.hub is None:
            raise ValueError("revision belongs to hub: remove it, or name a hub model")
        return self


class MixedConfig(Config):
    """The `mixed` baseline: one model trained on all domains at once.

    Its numbers of steps follow from the recipe: as many rows and rollouts as all specialists and
    the distillation have together.
    """

    sft: SftConfig | None = None
    """Supervised training on all demonstrations; its `num_steps` is replaced. Null: none."""
    grpo: GrpoConfig | None = None
    """Reinforcement on all domains; its `num_steps` is replaced. Null: none."""


class TiesConfig(MergeStage):
    """The `ties` baseline (arXiv 2306.01708): trim, elect a sign, mean of the deltas that agree."""

    method: Literal["ties"] = "ties"  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
    """Leave it out."""
    density: float = Field(default=0.2, gt=0, le=1)
    """The share of each specialist's delta that is kept, by magnitude."""


class MergesConfig(Config):
    """What the weight-space baselines can be told; `average` needs nothing."""

    ties: TiesConfig = TiesConfig()
    """Trimming and scale of `ties`."""


class ClusterConfig(Config):
    """Where the roles run. Changes speed, and with `num_threads` also the last bits."""

    address: str | None = None
    """A Ray cluster to join, such as `ray://head:10001`; null: one is started on this machine."""
    num_workers: int | None = Field(default=None, ge=1)
    """Jobs that run side by side; null: as many as the cluster has room for."""
    num_threads: int = Field(default=1, ge=1)
    """CPU threads of each job. Part of a stage's key, since sums in another order differ."""
    gpus_per_job: float = Field(default=0, ge=0)
    """GPUs of each job; a fraction shares one."""
    timeout_s: float = Field(default=600, gt=0)
    """How long a silent job is waited for before the run says so and stops."""


class TrackingConfig(Config):
    """Where metrics go besides each stage's metrics.jsonl."""

    wandb: Literal["off", "offline", "online"] = "off"
    """`offline` writes a local wandb run to upload later; `online` needs a wandb login."""
    project: str = "posttrain"
    """The wandb project."""
    entity: str | None = None
    """The wandb team or user; null: the login's own."""


class Recipe(Config):
    """One run, from the base to the report."""

    name: str = Field(pattern="^" + NAME.pattern + "$")
    """The run's name and, under `runs/`, its folder."""
    seed: int = Field(default=0, ge=0)
    """Decides every random choice of the run."""
    base: BaseConfig
    """The checkpoint everything starts from."""
    domains: dict[str, DomainConfig] = Field(min_length=1)
    """What is to be learned, by name."""
    teachers: dict[str, str | dict[str, float]] = {}
    """Who teaches a domain in place of its own specialist: a checkpoint's or a LoRA adapter's
    folder, or several teachers with their weights, each a folder, `specialist/<domain>` or
    `base`."""
    distill: DistillConfig | None = None
    """On-policy distillation of all teachers into one student; null: none."""
    ablations: dict[str, dict[str, Any]] = {}
    """Other ways to distil the same teachers, by name: the fields of `distill` that differ. Each is
    trained, scored and drawn beside `distill`, as `opd/<name>`."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How every checkpoint is scored."""
    baselines: list[Baseline] = []
    """What the student is compared with."""
    merges: MergesConfig = MergesConfig()
    """Settings of the weight-space baselines."""
    mixed: MixedConfig | None = None
    """Settings of the `mixed` baseline; needed where it is asked for."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the roles run."""
    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go besides the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def domains_are_named_by_their_keys(cls, data: Any) -> Any:
        """Fills in each domain's name, without touching the caller's mapping."""
        if not isinstance(data, Mapping) or not isinstance(data.get("domains"), Mapping):
            return data
        domains: dict[Any, Any] = dict(cast("Mapping[Any, Any]", data["domains"]))
        for key, value in domains.items():
            if isinstance(value, Mapping) and not value.get("name"):
                domains[key] = {**value, "name": key}
        return {**data, "domains": domains}

    @field_validator("baselines")
    @classmethod
    def baselines_differ(cls, value: list[Baseline]) -> list[Baseline]:
        refuse_twice(value)
        return value

    @model_validator(mode="after")
    def names_fit_in_folders(self) -> Self:
        for key, domain in self.domains.items():
            if not NAME.fullmatch(key):
                raise FieldError(
                    f"domains.{key}", "this names folders: use letters, digits, - and _ only"
                )
            if domain.name != key:
                raise FieldError(
                    f"domains.{key}.name", f"found {domain.name!r}: remove it, the key is the name"
                )
        return self

    @model_validator(mode="after")
    def domains_leave_our_names_alone(self) -> Self:
        taken = {"macro": "the report's column of means"}
        if "mixed" in self.baselines:
            taken["mixed"] = "the mixed baseline's stages"
        for name in self.specialists():
            if name in taken:
                raise FieldError(
                    f"domains.{name}", f"this is the name of {taken[name]}: choose another"
                )
        return self

    @model_validator(mode="after")
    def of_streamed_rows_so_many_are_asked_for(self) -> Self:
        for name, domain in self.domains.items():
            if not domain.data.streaming:
                continue
            bounds = {"evaluate.num_prompts": self.evaluate.num_prompts}
            if domain.best_of:
                bounds[f"domains.{name}.best_of.num_prompts"] = domain.best_of.num_prompts
            for field, bound in bounds.items():
                if bound is None:
                    raise FieldError(
                        field, f"null is all prompts, and domain {name!r} is streamed: say how many"
                    )
        return self

    @model_validator(mode="after")
    def fields_name_domains(self) -> Self:
        known = list(self.specialists())
        given = [("teachers", name, known) for name in self.teachers]
        given += [("distill.domain_shares", name, known) for name in self.domain_shares]
        for i, source in enumerate(self.base.pretrain.mixture if self.base.pretrain else ()):
            if source.domain is not None:  # its effort is a field of its own
                field = f"base.pretrain.mixture.{i}.domain"
                given.append((field, source.domain, list(self.domains)))
        for field, name, names in given:
            if name not in names:
                raise FieldError(
                    field, f"{name!r} is no domain of this recipe: they are {', '.join(names)}"
                )
        return self

    @model_validator(mode="after")
    def every_domain_has_a_teacher(self) -> Self:
        for name, domain in self.specialists().items():
            if self.distill and not (domain.is_trained or name in self.teachers):
                raise FieldError(
                    f"domains.{name.partition('@')[0]}",
                    "there is no teacher for distill: give it sft, grpo or best_of, or a "
                    f"checkpoint under teachers.{name}",
                )
        return self

    @model_validator(mode="after")
    def mixtures_name_teachers(self) -> Self:
        trained = [f"specialist/{n}" for n, d in self.specialists().items() if d.is_trained]
        for domain, mixture in self.teachers.items():
            if isinstance(mixture, str):
                continue
            try:
                check_weights(mixture, of=f"the teachers of {domain}")
            except ValueError as error:
                raise FieldError(f"teachers.{domain}", str(error)) from None
            for name in mixture:
                if name.startswith("specialist/") and name not in trained:
                    raise FieldError(
                        f"teachers.{domain}",
                        f"{name} is no specialist of this recipe: they are {', '.join(trained)}",
                    )
        return self

    @model_validator(mode="after")
    def judges_are_specialists(self) -> Self:
        domains = self.specialists()
        for name, domain in domains.items():
            judge = domain.judge and domain.judge.specialist
            if not judge:
                continue
            field = f"domains.{name.partition('@')[0]}.judge.checkpoint"
            if judge not in domains or not domains[judge].is_trained:
                trained = ", ".join(n for n, d in domains.items() if d.is_trained)
                raise FieldError(field, f"{judge!r} is no specialist of this recipe: {trained} are")
            theirs = domains[judge].judge
            if judge == name or (theirs and theirs.specialist):
                raise FieldError(
                    field,
                    f"{judge!r} is judged by a specialist itself: give it another reward, such as "
                    "verdicts",
                )
        return self

    @model_validator(mode="after")
    def baselines_can_be_made(self) -> Self:
        if "mixed" in self.baselines and not (self.mixed and (self.mixed.sft or self.mixed.grpo)):
            raise FieldError(
                "baselines", "mixed is asked for: say how, under mixed.sft or mixed.grpo"
            )
        trained = any(domain.is_trained for domain in self.domains.values())
        for merge in ("average", "ties"):
            if merge in self.baselines and not trained:
                raise FieldError(
                    "baselines",
                    f"no domain has sft, grpo or best_of, so {merge} has nothing to merge: "
                    "remove it",
                )
        return self

    @model_validator(mode="after")
    def ablations_are_distillations(self) -> Self:
        if self.ablations and not self.distill:
            raise FieldError("ablations", "there is no distill to differ from: add it")
        for name in self.ablations:
            if not NAME.fullmatch(name):
                raise FieldError(
                    f"ablations.{name}", "this names folders: use letters, digits, - and _ only"
                )
            try:
                self._ablation(name)
            except ValidationError as error:
                detail = error.errors(include_url=False)[0]
                where = ".".join(["ablations", name, *map(str, detail["loc"])])
                raise FieldError(where, f"as a field of distill: {detail['msg']}") from None
        return self

    @model_validator(mode="after")
    def the_student_starts_from_a_stage(self) -> Self:
        trained = [f"specialist/{n}" for n, d in self.specialists().items() if d.is_trained]
        starts = ["base", *(["average"] if trained else []), *trained]
        for stage, distill in self.distillations().items():
            if distill.start not in starts:
                field = "distill" if stage == "opd" else stage.replace("opd/", "ablations.")
                raise FieldError(
                    f"{field}.start",
                    f"{distill.start!r} is no stage here: use one of {', '.join(starts)}",
                )
        return self

    @property
    def domain_shares(self) -> dict[str, float]:
        """The shares that distill gives; empty: equal ones."""
        return (self.distill and self.distill.domain_shares) or {}

    def distillations(self) -> dict[str, DistillConfig]:
        """By stage: `opd`, and an `opd/<name>` for each ablation."""
        if self.distill is None:
            return {}
        return {"opd": self.distill} | {f"opd/{n}": self._ablation(n) for n in self.ablations}

    def _ablation(self, name: str) -> DistillConfig:
        assert self.distill is not None
        below = self.distill.model_dump(exclude_unset=True)
        return DistillConfig.model_validate(overlaid(below, self.ablations[name]))

    def mixture(self, domain: str) -> dict[str, float]:
        """A domain's teachers and their weights, by what they are to a stage: `specialist/code`,
        `base`, or a folder's `teacher/code`, of several `teacher/code.1` and so on."""
        given = self.teachers.get(domain)
        if given is None:
            return {f"specialist/{domain}": 1.0}
        if isinstance(given, str):
            return {f"teacher/{domain}": 1.0}
        return {_role(domain, i, name): weight for i, (name, weight) in _numbered(given)}

    def teacher_folders(self, domain: str) -> dict[str, str]:
        """The folders among a domain's teachers, by the same names."""
        given = self.teachers.get(domain, {})
        if isinstance(given, str):
            return {f"teacher/{domain}": given}
        roles = {_role(domain, i, name): name for i, (name, _) in _numbered(given)}
        return {role: name for role, name in roles.items() if role != name}

    def specialists(self) -> dict[str, DomainConfig]:
        """The domains with one entry per effort: `mathematics`, or `mathematics@none`, `@high`."""
        found: dict[str, DomainConfig] = {}
        for key, domain in self.domains.items():
            for effort, one in domain.by_effort.items():
                name = f"{key}@{effort}" if domain.efforts else key
                found[name] = one.model_copy(update={"name": name})
        return found
