"""Checkpoints on disk: written whole or not at all, loaded through the Auto classes, named by
their weights' hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.adapters import find_base, is_adapter
from posttrain.backbone import official  # the package registers V4ForCausalLM
from posttrain.errors import CheckpointError
from posttrain.files import whole_folder
from posttrain.hashes import FileHashes


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Model and tokenizer into `folder`, which appears whole: safetensors, config and tokenizer
    files."""
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(str(partial))


def load_model(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model in eval mode, from a folder or a hub id, in transformers' layout or,
    a local folder, in DeepSeek-V4's official one; of a LoRA adapter's folder its base with the
    adapter merged into it.

    Raises:
        CheckpointError: no checkpoint there, or one whose tensors do not match its config.
    """
    if is_adapter(Path(folder)):
        from peft import PeftModel  # which takes a second to import

        peft: Any = PeftModel.from_pretrained(
            load_model(find_base(Path(folder)), dtype=dtype), folder
        )
        merged = peft.merge_and_unload().requires_grad_(True)  # PEFT had frozen the base
        return merged.eval()
    _check_folder(folder)
    try:
        if official.is_official(Path(folder)):
            return official.load(Path(folder), dtype=dtype).eval()
        auto: Any = AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error
    problems = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "mismatched_keys")
        if info[kind]
    }
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {problems}")
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer saved beside a model; an adapter's own, or else its base's.

    Raises:
        CheckpointError: there is none.
    """
    if is_adapter(Path(folder)) and not (Path(folder) / "tokenizer.json").exists():
        folder = find_base(Path(folder))
    if not is_adapter(Path(folder)):
        _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a tokenizer from {folder}: {error}") from error


def weights_hash(folder: Path, hashes: FileHashes | None = None) -> str:
    """sha256 over the names and hashes of a checkpoint's or an adapter's weight files; `hashes`
    may remember those of files that did not change."""
    hashes = hashes or FileHashes()
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}\0{hashes.of(path)}\n".encode())
    return digest.hexdigest()


def _check_folder(folder: str | Path) -> None:
    """A path that looks local must hold a config.json; anything else is taken for a hub id."""
    path = Path(folder)
    if (path.exists() or path.is_absolute()) and not (path / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds no checkpoint (no config.json): give the folder that save_pretrained "
            "wrote, for a run's stage its checkpoint/ subfolder"
        )
