"""The sandbox that a domain's reward runs programs in, as this machine can have it."""

from collections.abc import Sequence

from posttrain.domains import Row
from posttrain.pipeline.recipe_domain import DomainConfig
from rewards.programs import sandbox_levels
from rewards.sandbox import LEVELS, Level, Sandbox


def sandbox_level(domain: DomainConfig, rows: Sequence[Row]) -> Level | None:
    """The weakest level that its rows' programs will run at; None where none is run.

    Raises:
        SandboxError: a row asks for more than this machine allows.
    """
    if "programs" not in domain.reward_weights:
        return None
    found: list[Level] = []
    for lowest in sandbox_levels([("", domain.reward_fields(row.fields)) for row in rows]):
        with Sandbox(lowest=lowest) as sandbox:
            found.append(sandbox.level)
    return min(found, key=LEVELS.index, default=None)
