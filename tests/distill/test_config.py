"""What a distillation's config refuses, in words a user can act on."""

import subprocess
import sys
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from distill.balance import Denominator
from distill.config import DistillConfig, DivergenceConfig, OpdStage
from distill.divergences import Kind

DOMAINS: list[dict[str, Any]] = [
    {"name": name, "data": {"jsonl": f"{name}.jsonl"}, "reward": "exact"} for name in ("a", "b")
]


def stage(**fields: Any) -> OpdStage:
    given = {"domains": DOMAINS, "distill": {}, "teachers": {"a": "specialist/a", "b": "other"}}
    return OpdStage.model_validate({**given, **fields})


def test_shares_are_one_where_not_named() -> None:
    assert stage().shares == {"a": 1.0, "b": 1.0}
    assert stage(distill={"domain_shares": {"b": 3}}).shares == {"a": 1.0, "b": 3.0}


def test_every_domain_needs_exactly_one_teacher() -> None:
    with pytest.raises(ValidationError, match=r"teachers names \['a'\].*\['a', 'b'\]"):
        stage(teachers={"a": "specialist/a"})


def test_shares_of_unknown_domains_and_shares_not_above_zero_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"domain_shares names \['c'\]"):
        stage(distill={"domain_shares": {"c": 1}})
    with pytest.raises(ValidationError, match=r"above 0, found \{'a': 0.0\}"):
        DistillConfig(domain_shares={"a": 0})


def test_the_divergences_of_a_recipe_are_those_of_the_loss() -> None:
    kinds = DivergenceConfig.model_fields["kind"].annotation
    assert get_args(kinds) == get_args(Kind)
    assert get_args(DistillConfig.model_fields["denominator"].annotation) == get_args(Denominator)
    with pytest.raises(ValidationError, match="beta"):
        DistillConfig.model_validate({"divergence": {"kind": "jsd", "beta": 1.0}})


def test_the_config_imports_no_torch() -> None:
    code = "import sys, distill.config, posttrain.merge_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
