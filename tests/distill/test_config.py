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


ADAMW = {"name": "adamw", "learning_rate": 1e-3}


def stage(**fields: Any) -> OpdStage:
    given = {"domains": DOMAINS, "distill": {}, "teachers": {"a": "specialist/a", "b": "other"}}
    return OpdStage.model_validate({**given, **fields})


def test_shares_are_one_where_not_named() -> None:
    assert stage().shares == {"a": 1.0, "b": 1.0}
    assert stage(distill={"domain_shares": {"b": 3}}).shares == {"a": 1.0, "b": 3.0}


def test_a_domains_teachers_are_normalised_and_the_base_is_added() -> None:
    teachers = {"a": {"specialist/a": 3, "other": 1}, "b": "base"}
    assert stage(teachers=teachers).mixtures == {
        "a": {"specialist/a": 0.75, "other": 0.25}, "b": {"base": 1.0},
    }  # fmt: skip
    held = stage(teachers=teachers, distill={"kl_to_base": 0.1})
    assert held.mixtures["a"] == {"specialist/a": 0.75, "other": 0.25, "base": 0.1}
    assert held.mixtures["b"] == {"base": 1.1}
    assert held.teacher_names == ["base", "other", "specialist/a"]
    for weights, found in (({"x": 1, "y": 0}, "'y': 0.0"), ({}, "no teacher")):
        with pytest.raises(ValidationError, match=f"the teachers of a need .* found .*{found}"):
            stage(teachers={"a": weights, "b": "other"})


def test_the_kl_to_the_base_joins_no_ablation() -> None:
    with pytest.raises(ValidationError, match=r"kl_to_base is 0.1, but divergence.kind is jsd"):
        stage(distill={"kl_to_base": 0.1, "divergence": {"kind": "jsd"}})


def test_a_warmup_ends_before_the_run_and_is_held_back_by_no_base() -> None:
    with pytest.raises(ValidationError, match=r"warmup_steps is 5, and num_steps, .* 5: lower"):
        stage(distill={"num_steps": 5, "teacher_samples": {"warmup_steps": 5}})
    with pytest.raises(ValidationError, match=r"kl_to_base is 0.1, but the 2 steps"):
        stage(distill={"kl_to_base": 0.1, "teacher_samples": {"warmup_steps": 2}})
    with pytest.raises(ValidationError, match="less than 1"):
        stage(distill={"teacher_samples": {"share": 1.0}})


def test_a_vocabulary_is_shared_out_by_strategies_and_for_a_loss_that_can() -> None:
    learners = {"num_ranks": 2, "vocab_parallel": True}
    assert DistillConfig.model_validate({"learners": learners}).learners.vocab_parallel
    refused: list[tuple[dict[str, Any], str]] = [
        ({"learners": {**learners, "strategy": "zero2"}, "optimizer": ADAMW}, "zero2"),
        ({"learners": learners, "divergence": {"kind": "jsd"}}, "divergence.kind jsd"),
        (
            {"learners": learners, "teacher_samples": {"warmup_steps": 2}},
            "warmup_steps 2: set the latter to 0",
        ),
    ]
    for distill, words in refused:
        with pytest.raises(ValidationError, match=rf"vocab_parallel is true and .*{words}"):
            stage(distill=distill)


def test_vllm_samples_in_workers_alone_and_its_options_are_its_own() -> None:
    with pytest.raises(ValidationError, match="num_rollout_workers 0"):
        DistillConfig(num_steps=3, rollout_backend="vllm")
    with pytest.raises(ValidationError, match="rollout_backend is engine"):
        DistillConfig(num_steps=3, num_rollout_workers=1, vllm_options={"seed": 1})
    options = {"tensor_parallel_size": 4}
    found = DistillConfig(
        num_steps=3, num_rollout_workers=1, rollout_backend="vllm", vllm_options=options
    )
    assert found.vllm_options == options


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeeds_strategies_have_no_muon(strategy: str) -> None:
    learners = {"strategy": strategy}
    with pytest.raises(ValidationError, match=rf"name is muon, but .*{strategy}.* to adamw"):
        DistillConfig.model_validate({"learners": learners})
    DistillConfig.model_validate(
        {"learners": learners, "optimizer": {"name": "adamw", "learning_rate": 1e-3}}
    )


def test_every_domain_needs_teachers() -> None:
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
