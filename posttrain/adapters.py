"""LoRA adapters on disk (PEFT's files): a few tensors, and the base that they change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.files import whole_folder, write_atomic

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).exists()


def base_name(folder: Path) -> str:
    """The adapter's `base_model_name_or_path`: a path or a model of the hub. Raises
    CheckpointError where the config is broken or names none."""
    path = folder / CONFIG
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} names no base_model_name_or_path: {error!r}") from None
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{path}: base_model_name_or_path is {named!r}: write a path")
    return named


def find_base(folder: Path) -> Path:
    """The folder of an adapter's base, absolute or relative to the adapter. Raises CheckpointError
    where that is no checkpoint's folder."""
    named = base_name(folder)
    base = (folder / named).resolve()
    if not (base / "config.json").exists():
        raise CheckpointError(
            f"the adapter {folder} is of the base {named!r}, which is no checkpoint's folder: "
            f"write the base's path, absolute or relative to the adapter, into {folder / CONFIG}"
        )
    return base


def copy_adapter(source: Path, folder: Path, *, base: Path) -> None:
    """The adapter as `folder`, which appears whole and names `base` by its absolute path."""
    with whole_folder(folder) as partial:
        shutil.copytree(source, partial)
        _name_base(partial, os.fspath(base.resolve()))


def save_adapter(model: Any, tokenizer: Any, folder: Path, *, base: Path) -> None:
    """A PEFT model's adapter with the tokenizer as `folder`, which appears whole; it names its base
    by the path from there, so that both may move together."""
    with whole_folder(folder) as partial:
        model.save_pretrained(
            str(partial), save_embedding_layers=False, selected_adapters=[ADAPTER]
        )
        tokenizer.save_pretrained(str(partial))
        _name_base(partial, os.path.relpath(base.resolve(), folder.resolve()))


def _name_base(folder: Path, base: str) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
