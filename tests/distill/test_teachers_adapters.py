"""LoRA specialists take turns on one base, and say what they say alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from distill.hiring import identify
from distill.reverse_kl import Head
from distill.teacher_adapters import check_adapter
from distill.teacher_files import Place, find_teacher
from distill.teacher_memory import Residents
from distill.teacher_models import Loader
from posttrain.backbone import V4ForCausalLM
from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.metrics import Metrics
from specialists.config import ExistingStage
from specialists.pretrain import work_existing

ATTENTION = r".*self_attn\.(q_a_proj|q_b_proj|kv_proj|o_b_proj)"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4},
    "experts": {"target_modules": ATTENTION, "target_parameters": EXPERTS, "r": 2},
    "shared": {"target_modules": r".*mlp\.shared_experts\..*_proj", "r": 3},
}
IDS = torch.tensor([[5, 9, 77, 30, 4, 8], [3, 7, 6, 0, 0, 0]])
MASK = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def base(stages: dict[str, Path]) -> Path:
    return stages["base"] / "checkpoint"


def write_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """A LoRA of random numbers, its base named relative to it."""
    with torch.random.fork_rng():
        torch.manual_seed(len(folder.name))
        lora = LoraConfig(lora_alpha=8, init_lora_weights=False, **config)
        model: Any = get_peft_model(load_model(base), lora)
    model.save_pretrained(folder, save_embedding_layers=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = os.path.relpath(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(base, home / name, **kind) for name, kind in KINDS.items()}


def aligned(folder: Path) -> Any:
    """The checkpoint in memory: transformers maps the file, and at its odd addresses the last bits
    of products differ."""
    model: Any = load_model(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def read(model: Any) -> Tensor:
    return model.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state


def test_adapters_and_their_base_swap_and_say_what_each_says_alone(
    base: Path, adapters: dict[str, Path]
) -> None:
    plain = Loader(dtype=torch.float32, device="cpu")
    wanted = {"base": read(aligned(base))}
    for name, folder in adapters.items():
        peft: Any = PeftModel.from_pretrained(aligned(base), folder)
        wanted[name] = read(peft.get_base_model())
        assert (wanted[name] - wanted["base"]).abs().max() > 0.01
    residents = Residents(plain, capacity=1, max_bytes=1e12)
    places = {name: find_teacher(folder) for name, folder in adapters.items()}
    places["base"] = Place(base)
    models: set[int] = set()
    for name in ("base", *KINDS, "base", *reversed(KINDS), "attention", "base"):
        model = residents(places[name])
        models.add(id(model))
        found = read(model)
        assert torch.equal(found, wanted[name])  # so a swap leaves nothing behind
    assert len(models) == 1  # one base in memory for all


def test_an_adapter_that_changes_the_head_is_refused(base: Path, tmp_path: Path) -> None:
    skeleton = Loader(dtype=torch.float32, device="cpu").skeleton(base)
    lora = write_adapter(base, tmp_path / "lora", target_modules=["lm_head"], r=2)
    whole = write_adapter(
        base, tmp_path / "whole", target_modules=ATTENTION, modules_to_save=["lm_head"], r=2
    )
    for folder in (lora, whole):
        with pytest.raises(CheckpointError, match=rf"{folder.name} changes the head \(.*lm_head"):
            check_adapter(folder, skeleton)
    settings = json.loads((lora / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="is of type IA3"):
        check_adapter(lora, skeleton)


def test_an_adapter_loads_as_its_base_with_the_adapter_merged(
    base: Path, adapters: dict[str, Path]
) -> None:
    for folder in adapters.values():
        peft: Any = PeftModel.from_pretrained(aligned(base), folder)
        merged: Any = load_model(folder)
        assert type(merged) is V4ForCausalLM
        torch.testing.assert_close(read(merged), read(peft.get_base_model()), rtol=1e-4, atol=1e-4)
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()


@pytest.mark.parametrize("is_of_the_runs_base", [False, True])
def test_an_adapter_from_elsewhere_stays_an_adapter_in_the_run(
    base: Path, adapters: dict[str, Path], tmp_path: Path, is_of_the_runs_base: bool
) -> None:
    folder = tmp_path / "elsewhere" / "lora"
    shutil.copytree(adapters["experts"], folder)
    config = folder / "adapter_config.json"
    name = "someone/a-base" if is_of_the_runs_base else os.path.relpath(base, folder)
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": name}
    config.write_text(json.dumps(settings))
    out = tmp_path / "run"
    out.mkdir()
    metrics = Metrics(out / "metrics.jsonl", stage="teacher")
    inputs = {"base": base.parent} if is_of_the_runs_base else {}
    job = Job(out, inputs, folder.parent, seed=0, num_threads=1, metrics=metrics)
    work_existing(ExistingStage(path="lora"), job)
    assert find_teacher(out / "checkpoint") == Place(base.resolve(), out / "checkpoint")
    plain, found = find_teacher(adapters["experts"]), find_teacher(out / "checkpoint")
    residents = Residents(Loader(dtype=torch.float32, device="cpu"), capacity=1, max_bytes=1e12)
    assert torch.equal(read(residents(plain)), read(residents(found)))


def test_an_adapter_whose_base_is_no_folder_is_refused(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "somebody/some-model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="of the base 'somebody/some-model'"):
        find_teacher(tmp_path)


def test_an_adapter_is_another_teacher_than_its_base_and_than_another(
    base: Path, adapters: dict[str, Path], make_model: Callable[..., V4ForCausalLM]
) -> None:
    loader, tokenizer = Loader(dtype=torch.float32, device="cpu"), load_tokenizer(base)
    head = loader.head(base)
    places = [Place(base), *(find_teacher(folder) for folder in adapters.values())]
    found = [identify(place, head, tokenizer) for place in places]
    assert len({one.get("adapter") for one in found}) == len(found)
    assert len({one["weights"] for one in found}) == 1
    other = identify(places[0], Head(head.weight, scale=0.5), tokenizer)
    assert [part for part in other if other[part] != found[0][part]] == ["head"]
