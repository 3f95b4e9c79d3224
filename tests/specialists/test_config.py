import subprocess
import sys

import pytest
from pydantic import ValidationError

from posttrain.config import OptimizerConfig
from posttrain.domains import DataConfig
from specialists.config import (
    BestOfConfig,
    ExistingStage,
    GrpoConfig,
    MixtureConfig,
    PretrainConfig,
    PretrainStage,
    ScoreConfig,
    SftConfig,
)


def test_reading_configs_imports_no_torch() -> None:
    check = (
        "import sys, specialists.config; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_microbatches_divide_a_step() -> None:
    assert SftConfig(rows_per_step=12, rows_per_microbatch=4).microbatches == 3
    assert GrpoConfig(prompts_per_step=3, samples_per_prompt=4).microbatches == 1
    with pytest.raises(ValidationError, match="rows_per_microbatch is 5, which does not divide 12"):
        SftConfig(rows_per_step=12, rows_per_microbatch=5)
    with pytest.raises(ValidationError, match="rows_per_microbatch is 5, which does not divide 12"):
        GrpoConfig(prompts_per_step=3, samples_per_prompt=4, rows_per_microbatch=5)


def test_scores_are_of_validation_rows_and_choose_only_where_there_are_some() -> None:
    with pytest.raises(ValidationError, match="score is of the rows of validation_share, which is"):
        SftConfig(score=ScoreConfig())
    with pytest.raises(ValidationError, match="best_by is score, and score is null"):
        SftConfig(validation_share=0.5, best_by="score")
    with pytest.raises(
        ValidationError, match="keep_per_prompt is 3, and samples_per_prompt only 2"
    ):
        BestOfConfig(samples_per_prompt=2, keep_per_prompt=3)


def test_a_mixture_may_only_name_domains_that_there_are() -> None:
    source = MixtureConfig(data=DataConfig(jsonl="rows.jsonl"), domain="musik")
    pretrain = PretrainConfig(mixture=[source], optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(ValidationError, match="the mixture names domain 'musik', which is none of"):
        PretrainStage(preset="tiny", pretrain=pretrain)


def test_an_existing_base_comes_from_one_place() -> None:
    with pytest.raises(ValidationError, match="exactly one of path and hub"):
        ExistingStage(path="base", hub="someone/model")
