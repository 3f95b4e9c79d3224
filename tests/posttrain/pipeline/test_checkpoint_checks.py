"""Laws of a recipe's checkpoints and adapters: what cannot be used is named before compute."""

import json
from pathlib import Path

import numpy as np
import pytest
from own_recipe import RECIPE, checked, line_of, message_of, write_recipe
from safetensors.numpy import save_file

from posttrain.tokenizer import build_tokenizer


def write_checkpoint(folder: Path) -> Path:
    """What the checks read of one: a tokenizer, a config and weights."""
    build_tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text('{"model_type": "deepseek_v4"}')
    save_file({"weight": np.zeros(1)}, folder / "model.safetensors")
    return folder


def test_a_teacher_must_give_every_token_the_same_id(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "teachers: {letters: teacher}\n")
    folder = write_checkpoint(tmp_path / "teacher")
    checked(path)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    message = message_of(path)
    assert message.startswith(f"{line_of(path, 'teachers:')}: teachers.letters: ")
    assert "'a'" in message


def test_a_teacher_may_be_an_adapter_of_a_base_that_is_there(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE + "teachers: {letters: lora}\n")
    (tmp_path / "lora").mkdir()
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "../elder"}')
    save_file({"lora_A": np.zeros(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    assert "of the base '../elder', which is no checkpoint's folder" in message_of(path)
    write_checkpoint(tmp_path / "elder")
    checked(path)
    config.write_text('{"base_model_name_or_path": null}')
    assert "base_model_name_or_path is None: write a path" in message_of(path)
    config.write_text('{"base_model_name_or_path": "../elder"}')
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"cut")
    message = message_of(path)
    assert message.startswith(f"{line_of(path, 'teachers:')}: teachers.letters: ")
    assert "adapter_model.safetensors holds no whole weights" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "config.json is no JSON"),
        ("config.json", b"{}", "config.json names no model"),
        ("tokenizer.json", b"{", "tokenizer.json is no tokenizer"),
        ("model.safetensors", b"cut", "model.safetensors holds no whole weights"),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = write_recipe(tmp_path)
    folder = write_checkpoint(tmp_path / "teacher")
    (folder / name).write_bytes(content)
    message = message_of(path, "base={path: teacher}")
    assert message.startswith("--set: base.path: ")
    assert said in message


@pytest.mark.parametrize(
    ("field", "value"), [("base", "{path: nowhere}"), ("teachers", "{letters: no}")]
)
def test_a_missing_checkpoint_is_named(tmp_path: Path, field: str, value: str) -> None:
    message = message_of(write_recipe(tmp_path), f"{field}={value}")
    assert "is no folder" in message
    assert field in message


@pytest.mark.parametrize("field", ["base={path: capped}", "teachers={letters: capped}"])
def test_logits_that_distillation_cannot_rebuild_are_refused(tmp_path: Path, field: str) -> None:
    path = write_recipe(tmp_path)
    folder = write_checkpoint(tmp_path / "capped")
    config = {"model_type": "gemma2", "final_logit_softcapping": 30.0}
    (folder / "config.json").write_text(json.dumps(config))
    message = message_of(path, field)
    assert "changes its logits by final_logit_softcapping" in message
    assert field.partition("=")[0] in message
    checked(path, "base={path: capped}", "distill=null")
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": None}))
    checked(path, field)
