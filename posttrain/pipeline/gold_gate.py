"""What stands before a run's first training stage: the gold answers of what it will train on.

gold.json    in the run's directory: of each domain what was found, under a hash of its rows and
             graders, so that a run that goes on does not grade them again
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from distill.config import OpdStage
from posttrain.domains import fingerprint
from posttrain.files import write_atomic
from posttrain.pipeline import source
from posttrain.pipeline.fingerprints import named_modules
from posttrain.pipeline.gold import GoldFacts, GoldReport, check_domain, line_of
from posttrain.pipeline.recipe import DomainConfig, Recipe
from posttrain.pipeline.stages import Stage
from specialists.config import BestOfStage, GrpoStage, SftStage

RECORD = "gold.json"

READ = ("data", "reward", "reward_options", "reward_timeout_s", "environment", "bad_gold")
"""The fields of a domain that decide what is found."""

NUM_WRONG_ROWS = 200
"""So many rows of a domain are tried with wrong answers; with its gold all are."""

TELL_EVERY_S = 5.0


def check_golds(
    recipe: Recipe,
    folder: Path,
    directory: Path,
    todo: Iterable[Stage],
    say: Callable[[str], None],
) -> None:
    """Grade the gold answers of the domains that the stages `todo` train on, each content once.

    Raises:
        DataError: naming the domain, the row, the answer, the reward and its reason.
    """
    path = directory / RECORD
    record = read(directory)
    names = trained(recipe, todo)
    for name in names:
        domain = recipe.domains[name]
        mark = content_hash(domain, folder, seed=recipe.seed)
        if record.get(name, {}).get("hash") != mark:
            facts = check_domain(
                name, domain, folder=folder, seed=recipe.seed, num_wrong_rows=NUM_WRONG_ROWS,
                tell=_telling(name, say),
            )  # fmt: skip
            record[name] = {"hash": mark, "facts": [asdict(fact) for fact in facts]}
            write_atomic(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
            for fact in facts:
                say(f"gold     {line_of(fact)}")
    GoldReport(
        [GoldFacts(**facts) for name in names for facts in record[name]["facts"]]
    ).raise_problems()


def read(directory: Path) -> dict[str, Any]:
    """What a run's earlier attempts found, by domain."""
    path = directory / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def trained(recipe: Recipe, todo: Iterable[Stage]) -> list[str]:
    """The domains whose rows some stage of `todo` trains a specialist or a student on."""
    found: set[str] = set()
    for config in (stage.config for stage in todo):
        if isinstance(config, BestOfStage):
            found.add(config.domain.name.partition("@")[0])
        elif isinstance(config, SftStage | GrpoStage | OpdStage):
            found |= {spec.name.partition("@")[0] for spec in config.domains}
    return [name for name in recipe.domains if name in found]


def content_hash(domain: DomainConfig, folder: Path, *, seed: int) -> str:
    """sha256 over a domain's rows and graders; a hub data set is taken by its name."""
    content = {
        "domain": domain.model_dump(mode="json", include=set(READ)),
        "data": fingerprint(domain.data, folder),
        "code": source.code_version(sorted(named_modules(domain.spec)), folder),
        "versions": source.versions(),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _telling(name: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Says now and then how far a domain is."""
    last = monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last > TELL_EVERY_S:
            last = monotonic()
            say(f"gold     {name}: {done} of {total} answers graded")

    return tell
