"""What can be seen of a checkpoint's or an adapter's files in a moment, without torch."""

import json
from pathlib import Path
from typing import Any, cast

from distill.logits import logit_scale
from posttrain.adapters import WEIGHTS, base_name, find_base, is_adapter
from posttrain.errors import CheckpointError


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless the folder holds a model, its tokenizer and its weights."""
    wanted = {"a model": "config.json", "a tokenizer": "tokenizer.json", "weights": "*.safetensors"}
    for what, pattern in wanted.items():
        if not any(folder.glob(pattern)):
            missing = f"holds no {pattern}" if folder.is_dir() else "is no folder"
            raise CheckpointError(
                f"{folder} {missing}: give a folder with {what}, as save_pretrained writes it"
            )
    read_config(folder)
    read_tokenizer(folder)
    for path in sorted(folder.glob("*.safetensors")):
        check_weights(path)


def check_model(folder: Path, *, hub: str | None) -> Path | None:
    """Raise CheckpointError unless the folder holds a model, or an adapter whose base is a model's
    folder or the recipe's own from the hub. The model's folder, or None."""
    model: Path | None = folder
    if is_adapter(folder):
        check_weights(folder / WEIGHTS)
        model = None if base_name(folder) == hub else find_base(folder)
    if model:
        check_folder(model)
    return model


def check_teacher(folder: Path, *, hub: str | None) -> None:
    """As `check_model`; also where the loss cannot rebuild the model's logits."""
    model = check_model(folder, hub=hub)
    if model:
        check_logits(model)


def check_logits(folder: Path) -> None:
    """Raise CheckpointError where the loss cannot rebuild the logits of the model in the folder."""
    logit_scale(read_config(folder), name=str(folder))


def teacher_tokenizer(folder: Path) -> Any:
    """A teacher's own, or that of the base that it adapts."""
    has_own = (folder / "tokenizer.json").exists()
    return read_tokenizer(folder if has_own or not is_adapter(folder) else find_base(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises CheckpointError unless it names a model."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): save the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{path} names no model (no model_type): give a checkpoint as save_pretrained writes it"
        )
    return cast("dict[str, Any]", config)


def check_weights(path: Path) -> None:
    """Raise CheckpointError unless the file is whole, as far as its header tells."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no whole weights ({error}): copy or save the checkpoint again"
        ) from None


def checkpoint_folder(folder: Path) -> Path:
    """The folder itself, or the `checkpoint/` in a stage's folder; without torch, which takes
    seconds. Raises CheckpointError."""
    for candidate in (folder, folder / "checkpoint"):
        if is_adapter(candidate):
            check_weights(candidate / WEIGHTS)
            check_folder(find_base(candidate))
            return candidate
        if (candidate / "config.json").exists():
            read_config(candidate)
            for path in sorted(candidate.glob("*.safetensors")):
                check_weights(path)
            return candidate
    raise CheckpointError(
        f"{folder} holds no checkpoint (no config.json): give a folder that save_pretrained wrote, "
        "or a stage's folder in a run, such as runs/quickstart/stages/opd-..."
    )


def read_tokenizer(folder: Path) -> Any:
    """A checkpoint's tokenizer, without transformers; it has `get_vocab`."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  # tokenizers raises no narrower one
        raise CheckpointError(
            f"{path} is no tokenizer ({error}): save it again with save_pretrained"
        ) from None
