"""The stages of a recipe and their order; the only file that knows every one of them.

    base -> sft/<domain> -> grpo/<domain> -> best_of/<domain> -> average, ties
                                                              -> opd, opd/<ablation>
                                                                 -> evaluate/<checkpoint> -> report
    base -> sft/mixed    -> grpo/mixed

A domain trained under several efforts counts as several, `<domain>@<effort>`. A teacher from
elsewhere is a stage of its own, `teacher/<domain>`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from distill.config import DistillConfig, OpdStage
from posttrain.adapters import base_name, find_base, is_adapter
from posttrain.config import Config
from posttrain.domains import DataConfig, DomainSpec, fingerprint
from posttrain.evaluate_config import EvaluateStage
from posttrain.merge_config import MergeStage
from posttrain.pipeline import source
from posttrain.pipeline.fingerprints import checkpoint_fingerprint, named_modules
from posttrain.pipeline.judges import judge_fingerprints, judges_first, judging_stages
from posttrain.pipeline.ledger import hash_files
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.recipe_domain import DomainConfig
from posttrain.report_config import ReportStage
from specialists.config import (
    BestOfConfig,
    BestOfStage,
    ExistingStage,
    GrpoConfig,
    GrpoStage,
    PretrainStage,
    SftConfig,
    SftStage,
)

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"

ALONE_THREADS = 2
"""The base is made while nothing else runs: with so many times the threads of other stages."""

UNREWARDED = ("reward", "reward_options", "reward_timeout_s", "judge")
"""Fields of a domain that pretraining and, without `score` and `evaluate_every`, SFT and OPD do not
read: they grade nothing."""


@dataclass(frozen=True)
class Stage:
    """One stage: `Stage("sft/maths", "specialists.sft:work", config, {"start": "base"})`."""

    name: str
    work: str
    config: Config
    inputs: Mapping[str, str]
    """Stages it stands on, by the role they play."""

    num_threads: int = 1
    num_helpers: int = 0
    """Further workers that its roles live in, where there are so many."""
    num_required: int = 1
    """Workers, its own included, without which it cannot run, because of `required_by`."""
    required_by: str = ""

    is_alone: bool = False
    """Nothing else runs beside it."""

    modules: tuple[str, ...] = ()
    """Modules besides `work`'s own that it runs by name: rewards and tools."""

    fingerprints: Mapping[str, str] = field(default_factory=dict[str, str])
    """Hashes of what the config names and does not hold: data, checkpoints, templates."""


def stage_keys(stages: list[Stage], folder: Path, seed: int) -> dict[str, str]:
    """Each stage's key: sha256 of all that decides its result. Inputs come before their users."""
    keys: dict[str, str] = {}
    for stage in stages:
        content = {
            "work": stage.work,
            "config": stage.config.model_dump(mode="json"),
            "inputs": {role: keys[name] for role, name in stage.inputs.items()},
            "fingerprints": dict(stage.fingerprints),
            "code": source.code_version((stage.work.partition(":")[0], *stage.modules), folder),
            "versions": source.versions(),
            "seed": seed,
            "num_threads": stage.num_threads,
        }
        text = json.dumps(content, sort_keys=True)
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def build(recipe: Recipe, folder: Path) -> list[Stage]:
    """All stages of a recipe that lies in `folder`; each stands after its inputs."""
    return _Builder(recipe, folder).build()


class _Builder:
    """Collects the stages in order; `checkpoints` are those that are evaluated, by report name."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        share = max(domain.heldout_share for domain in recipe.domains.values())
        self.domains = {
            name: domain.model_copy(update={"exclude_share": share})
            for name, domain in recipe.specialists().items()
        }
        self.stages: list[Stage] = []
        self.checkpoints: dict[str, str] = {}
        self.specialists: dict[str, str] = {}
        """A domain's last stage, for each domain that is trained."""
        self._fingerprints: dict[str, str] = {}

    def build(self) -> list[Stage]:
        self._add_base()
        for name in judges_first(self.domains):
            self._add_specialist(name, self.domains[name])
        for domain in self.recipe.teachers:
            for stage, path in self.recipe.teacher_folders(domain).items():
                self._add_existing(stage, ExistingStage(path=path))
                self.checkpoints[stage] = stage
        self._add_merges()
        for name, distill in self.recipe.distillations().items():
            self._add_opd(name, distill)
        if "mixed" in self.recipe.baselines:
            self._add_mixed()
        for name, stage in self.checkpoints.items():
            self._add_evaluation(name, stage)
        self._add_report()
        return self.stages

    def _add(
        self,
        name: str,
        work: str,
        config: Config,
        inputs: Mapping[str, str],
        *,
        domains: list[DomainSpec] | None = None,
        num_helpers: int = 0,
        required: tuple[int, str] = (1, ""),
        is_alone: bool = False,
        fingerprints: Mapping[str, str] | None = None,
    ) -> str:
        specs = domains or []
        marks = {f"data/{spec.name}": self._fingerprint(spec.data) for spec in specs}
        marks |= {
            f"against/{spec.name}/{test}": self._fingerprint(data)
            for spec in specs
            if spec.decontaminate
            for test, data in spec.decontaminate.against.items()
        }
        marks |= judge_fingerprints(specs, self.folder)
        has_actor = isinstance(config, GrpoStage) or (
            isinstance(config, BestOfStage) and not config.best_of.score
        )
        judges = judging_stages(specs, self.specialists, has_actor=has_actor)
        threads = self.recipe.cluster.num_threads
        self.stages.append(
            Stage(
                name=name,
                work=work,
                config=config,
                inputs={**inputs, **judges},
                num_threads=threads * ALONE_THREADS if is_alone else threads,
                num_helpers=num_helpers,
                num_required=required[0],
                required_by=required[1],
                is_alone=is_alone,
                modules=tuple(sorted({m for spec in specs for m in named_modules(spec)})),
                fingerprints={**marks, **(fingerprints or {})},
            )
        )
        return name

    def _add_base(self) -> None:
        base = self.recipe.base
        self.checkpoints["base"] = "base"
        if base.preset is None or base.pretrain is None:
            config = ExistingStage(path=base.path, hub=base.hub, revision=base.revision)
            self._add_existing("base", config)
            return
        unread = (*UNREWARDED, "max_new_tokens")
        specs = [_without(domain.spec, unread) for domain in self.recipe.domains.values()]
        mixture = enumerate(base.pretrain.mixture)
        self._add(
            "base",
            "specialists.pretrain:work",
            PretrainStage(preset=base.preset, pretrain=base.pretrain, domains=specs),
            {},
            domains=specs,
            is_alone=True,
            fingerprints={f"mixture/{i}": self._fingerprint(part.data) for i, part in mixture},
        )

    def _add_existing(self, name: str, config: ExistingStage) -> None:
        marks: dict[str, str] = {}
        inputs: dict[str, str] = {}
        if config.path:
            folder = self.folder / config.path
            marks["checkpoint"] = checkpoint_fingerprint(folder)
            if is_adapter(folder):
                if base_name(folder) == self.recipe.base.hub:
                    inputs["base"] = "base"
                else:
                    marks["base"] = checkpoint_fingerprint(find_base(folder))
        self._add(name, "specialists.pretrain:work_existing", config, inputs, fingerprints=marks)

    def _add_specialist(self, name: str, domain: DomainConfig) -> None:
        start, specs = "base", [domain.spec]
        if domain.sft:
            start = self._add_sft(f"sft/{name}", specs, domain.sft, start)
            self.checkpoints[f"sft/{name}"] = start
        if domain.grpo:
            start = self._add_grpo(f"grpo/{name}", specs, domain.grpo, start)
        if domain.best_of:
            if domain.grpo:
                self.checkpoints[f"grpo/{name}"] = start
            start = self._add_best_of(f"best_of/{name}", domain.spec, domain.best_of, start)
        if start != "base":
            self.specialists[name] = self.checkpoints[f"specialist/{name}"] = start

    def _add_sft(self, name: str, specs: list[DomainSpec], sft: SftConfig, start: str) -> str:
        if not sft.score:
            specs = [_without(spec, UNREWARDED) for spec in specs]
        config = SftStage(domains=specs, sft=sft)
        return self._add(name, "specialists.sft:work", config, {"start": start}, domains=specs)

    def _add_grpo(self, name: str, specs: list[DomainSpec], grpo: GrpoConfig, start: str) -> str:
        config = GrpoStage(domains=specs, grpo=grpo)
        return self._add(name, "specialists.grpo:work", config, {"start": start}, domains=specs)

    def _add_best_of(self, name: str, spec: DomainSpec, best_of: BestOfConfig, last: str) -> str:
        config = BestOfStage(domain=spec, best_of=best_of)
        start = "base" if best_of.start == "base" else last
        inputs = {"start": start, "sampler": last}
        return self._add(name, "specialists.best_of:work", config, inputs, domains=[spec])

    def _add_merges(self) -> None:
        starts = {distill.start for distill in self.recipe.distillations().values()}
        wanted = {*self.recipe.baselines, *starts}
        settings = {
            "average": MergeStage.model_validate({"method": "average"}),
            "ties": self.recipe.merges.ties,
        }
        roles = {f"specialist/{name}": stage for name, stage in self.specialists.items()}
        for name, config in settings.items():
            if name in wanted:
                self._add(name, "posttrain.merge:work", config, {"base": "base", **roles})
                self.checkpoints[name] = name

    def _add_opd(self, name: str, distill: DistillConfig) -> None:
        teachers: dict[str, str | dict[str, float]] = {}
        inputs: dict[str, str] = {}
        for domain in self.domains:
            mixture = self.recipe.mixture(domain)
            teachers[domain] = mixture if len(mixture) > 1 else next(iter(mixture))
            inputs |= {role: self.checkpoints[role] for role in mixture}
        inputs[distill.start] = self.checkpoints[distill.start]
        if distill.kl_to_base:
            inputs["base"] = self.checkpoints["base"]
        specs = self._specs()
        if not distill.evaluate_every:
            specs = [_without(spec, UNREWARDED) for spec in specs]
        config = OpdStage(domains=specs, distill=distill, teachers=teachers)
        self.checkpoints[name] = self._add(
            name,
            "distill.opd:work",
            config,
            inputs,
            domains=specs,
            num_helpers=distill.num_teacher_workers
            + distill.num_rollout_workers
            + distill.learners.num_ranks
            - 1,
            required=required_workers(distill),
        )

    def _add_mixed(self) -> None:
        """One model on all domains, with as many rows as all specialists and OPD had together."""
        mixed = self.recipe.mixed
        assert mixed is not None
        start, specs = "base", self._specs()
        if mixed.sft:
            found = [how for d in self.domains.values() for how in (d.sft, d.best_of)]
            rows = sum(how.num_steps * how.rows_per_step for how in found if how)
            num_steps = max(1, round(rows / mixed.sft.rows_per_step))
            sft = mixed.sft.model_copy(update={"num_steps": num_steps})
            start = self._add_sft("sft/mixed", specs, sft, start)
        if mixed.grpo:
            num_steps = max(1, round(self._num_rollouts() / mixed.grpo.rows_per_step))
            grpo = mixed.grpo.model_copy(update={"num_steps": num_steps})
            start = self._add_grpo("grpo/mixed", specs, grpo, start)
        self.checkpoints["mixed"] = start

    def _num_rollouts(self) -> int:
        """Rollouts that all specialists' GRPO and OPD sample together."""
        grpos = [domain.grpo for domain in self.domains.values() if domain.grpo]
        distill = self.recipe.distill
        return sum(grpo.num_steps * grpo.rows_per_step for grpo in grpos) + (
            distill.num_steps * distill.prompts_per_step if distill else 0
        )

    def _add_evaluation(self, checkpoint: str, stage: str) -> None:
        specs = self._specs()
        self._add(
            f"evaluate/{checkpoint}",
            "posttrain.evaluate:work",
            EvaluateStage(domains=specs, evaluate=self.recipe.evaluate),
            {"checkpoint": stage},
            domains=specs,
        )

    def _add_report(self) -> None:
        inputs: dict[str, str] = {}
        for name in [stage.name for stage in self.stages]:
            inputs[name if name.startswith("evaluate/") else f"metrics/{name}"] = name
        oracle = {name: "base" for name in self.domains if name not in self.specialists}
        for domain in self.recipe.teachers:  # of several the heaviest answers for the oracle
            mixture = self.recipe.mixture(domain)
            oracle[domain] = max(mixture, key=mixture.__getitem__)
        content = {
            "name": self.recipe.name,
            "recipe": recipe_yaml(self.recipe),
            "domains": list(self.domains),
            "oracle": oracle,
            "num_resamples": self.recipe.evaluate.num_resamples,
            "seed": self.recipe.evaluate.seed,
        }
        config = ReportStage.model_validate(content)
        templates = {p.name: p for p in TEMPLATES.iterdir()}
        mark = {"templates": hash_files(templates)}
        self._add("report", "posttrain.report:work", config, inputs, fingerprints=mark)

    def _specs(self) -> list[DomainSpec]:
        return [domain.spec for domain in self.domains.values()]

    def _fingerprint(self, data: DataConfig) -> str:
        name = data.model_dump_json()
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprint(data, self.folder)
        return self._fingerprints[name]


def required_workers(distill: DistillConfig) -> tuple[int, str]:
    """Processes that a distillation cannot do without, and what asks for them."""
    num_ranks = distill.learners.num_ranks
    if num_ranks == 1 and distill.max_staleness and distill.teacher_dtype != "float32":
        return 2, f"distill.max_staleness with distill.teacher_dtype {distill.teacher_dtype}"
    return num_ranks, "distill.learners.num_ranks"


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default included."""
    content = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _without(spec: DomainSpec, fields: Collection[str]) -> DomainSpec:
    """The domain with these fields at one value: what a stage does not read decides no key."""
    kept = spec.model_dump(exclude=set(fields))
    return DomainSpec.model_validate({"reward": "exact", **kept})
