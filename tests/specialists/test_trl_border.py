"""Each test names what of TRL or transformers ours leans on, and says what to do when it moves."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from posttrain.backbone import V4ForCausalLM
from posttrain.checkpoints import load_model
from posttrain.config import OptimizerConfig
from posttrain.domains import DomainSpec
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.metrics import Metrics
from posttrain.rollout.types import Rollout
from specialists import grpo, sft, training
from specialists.config import GrpoConfig, GrpoStage, SftConfig, SftStage
from specialists.groups import as_trl
from specialists.trl_border import OurGRPOTrainer, OurSFTTrainer

NewJob = Callable[..., Job]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3)

OVERRIDDEN = {
    (GRPOTrainer, "_send_telemetry"): "93795bae4a8f",
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): "243f8dad685d",
    (GRPOTrainer, "_compute_loss"): "22441fe0745c",
    (GRPOTrainer, "_generate"): "510c1703fdc8",
    (GRPOTrainer, "_generate_and_score_completions"): "a43d6a7a15e8",
    (Trainer, "_load_from_checkpoint"): "2f2cf5770a0f",
    (GRPOTrainer, "create_model_card"): "4a016fcf5960",
}
"""Method -> a hash of its code as ours was written against it."""


def code_hash(function: Any) -> str:
    """Of the code alone: docstring, whole-line comments and layout do not count."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    lines = source.splitlines()
    if ast.get_docstring(tree) is not None:
        lines[tree.body[0].lineno - 1 : tree.body[0].end_lineno] = []
    code = ["".join(line.split()) for line in lines]
    code = [line for line in code if line and not line.startswith("#")]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("owner", "name"), OVERRIDDEN)
def test_the_overridden_method_is_the_one_ours_was_written_against(owner: type, name: str) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: find what took its place"
    found = code_hash(getattr(owner, name))
    assert found == OVERRIDDEN[owner, name], (
        f"{owner.__name__}.{name} has changed (its code hashes to {found}): read it, adapt "
        "specialists/trl_border.py, and put the new hash into OVERRIDDEN"
    )


def test_what_is_pinned_is_what_is_overridden() -> None:
    ours = {name for kind in OurGRPOTrainer.__mro__[:2] for name in vars(kind)}
    overridden = {name for name in ours if callable(getattr(GRPOTrainer, name, None))}
    named = {name for _, name in OVERRIDDEN}
    assert overridden - {"__dict__", "__weakref__", "__doc__", "__module__"} == named
    assert {n for n in vars(OurSFTTrainer) if callable(getattr(SFTTrainer, n, None))} == set()


class Scripted:
    """In a sampler's place: two prompts, two answers to each."""

    visits = (0, 1)

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        self.prompts = list(prompts)
        rollouts = [
            Rollout("p", "words", 0, [40, 41], [60 + i, 70, 1], [True] * 3, [-5.0] * 3)
            for i in range(4)
        ]
        return as_trl(rollouts, [1.0, 0.0, 0.25, 0.75])


def grpo_trainer(
    start: Path, tokenizer: Any, words: DomainSpec, job: Job, *, kl_weight: float = 0.0
) -> tuple[Any, Scripted]:
    settings: dict[str, Any] = {"num_steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2}
    config = GrpoConfig(**settings, optimizer=OPTIMIZER, kl_weight=kl_weight)
    scripted, model = Scripted(), load_model(start / "checkpoint")
    stage = GrpoStage(domains=[words], grpo=config)
    return grpo.build_trainer(model, tokenizer, scripted, stage, job), scripted  # pyright: ignore[reportArgumentType]


def test_the_reference_is_a_v4_and_equals_the_start(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # TRL looks config.architectures[0] up in transformers: the stock class would be wrong with
    # left padding, so V4ForCausalLM gives a name that is not there and TRL falls back to Auto
    trainer, _ = grpo_trainer(start, tokenizer, words, new_job("grpo"), kl_weight=0.1)
    assert type(trainer.ref_model) is V4ForCausalLM
    reference, policy = trainer.ref_model.state_dict(), trainer.model.state_dict()
    assert reference.keys() == policy.keys()
    assert all(torch.equal(reference[name], policy[name]) for name in policy)


def test_the_kl_is_zero_before_the_first_step(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo")
    trainer, _ = grpo_trainer(start, tokenizer, words, job, kl_weight=0.1)
    training.run(trainer, job, tokenizer)
    assert job.metrics.records()[-1]["kl"] == pytest.approx(0.0, abs=1e-9)


def test_without_a_kl_there_is_no_reference(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    trainer, _ = grpo_trainer(start, tokenizer, words, new_job("grpo"))
    assert trainer.ref_model is None


def test_rollout_func_gets_each_prompt_once_for_each_sample_in_order(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    job = new_job("grpo")
    trainer, scripted = grpo_trainer(start, tokenizer, words, job)
    training.run(trainer, job, tokenizer)
    assert scripted.prompts == ["0", "0", "1", "1"], (
        "TRL hands rollout_func its prompts in another way: adapt GroupSampler.__call__"
    )


def test_the_sampler_gap_is_the_distance_of_the_log_probabilities(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # an untrained model's log-probabilities are near -log V = -5.617; the script says -5
    job = new_job("grpo")
    trainer, _ = grpo_trainer(start, tokenizer, words, job)
    training.run(trainer, job, tokenizer)
    model: Any = load_model(start / "checkpoint")
    gaps: list[float] = []
    for i in range(4):
        ids = [40, 41, 60 + i, 70, 1]
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        gaps += [abs(logp[t - 1, ids[t]].item() + 5.0) for t in (2, 3, 4)]
    record = job.metrics.records()[-1]
    assert record["sampler_gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert record["sampler_gap_max"] == pytest.approx(max(gaps), abs=1e-5)


def test_no_trainer_adds_the_auxiliary_loss_of_other_experts(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob
) -> None:
    # TRL's load-balancing loss is Switch's over raw logits; V4's gate is another
    trainer, _ = grpo_trainer(start, tokenizer, words, new_job("grpo"))
    assert trainer.aux_loss_enabled is False
    config = SftConfig(num_steps=1, rows_per_step=2, optimizer=OPTIMIZER)
    job = new_job("sft")
    rows = sft.demonstrations(words, tokenizer, config, job)
    data = sft.in_order([rows], config, seed=0, weights=None)
    model = load_model(start / "checkpoint")
    assert sft.build_trainer(model, tokenizer, data, config, job).aux_loss_enabled is False


def loading_problems(kind: Any, folder: Path) -> dict[str, Any]:
    _, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {name: info[name] for name in kinds if info[name]}


def test_results_and_step_checkpoints_are_read_by_stock_and_by_ours(
    start: Path, words: DomainSpec, new_job: NewJob, cut_after: Callable[[Path, int], Metrics]
) -> None:
    job = new_job("sft", {"start": start})
    config = SftConfig(num_steps=2, rows_per_step=2, optimizer=OPTIMIZER, checkpoint_every=1)
    stage = SftStage(domains=[words], sft=config)
    with pytest.raises(KeyboardInterrupt):
        sft.work(stage, new_job("sft", {"start": start}, metrics=cut_after(job.out, 1)))
    step_checkpoint = job.out / training.STEPS / "checkpoint-1"
    for kind in (DeepseekV4ForCausalLM, V4ForCausalLM):
        assert not loading_problems(kind, step_checkpoint)
    sft.work(stage, job)
    for kind in (DeepseekV4ForCausalLM, V4ForCausalLM):
        assert not loading_problems(kind, job.out / training.RESULT)


def test_what_stock_saves_is_read_by_ours(start: Path, tmp_path: Path) -> None:
    stock = DeepseekV4ForCausalLM.from_pretrained(start / "checkpoint", dtype=torch.float32)
    stock.save_pretrained(tmp_path, save_original_format=False)
    assert not loading_problems(V4ForCausalLM, tmp_path)


def test_a_step_checkpoint_that_lacks_a_weight_is_refused(
    start: Path, tokenizer: Any, words: DomainSpec, new_job: NewJob, tmp_path: Path
) -> None:
    trainer, _ = grpo_trainer(start, tokenizer, words, new_job("grpo"))
    weights = {n: w.clone() for n, w in trainer.model.state_dict().items() if "lm_head" not in n}
    trainer.model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(CheckpointError, match=r"missing \['lm_head.weight'\]"):
        trainer._load_from_checkpoint(str(tmp_path))
