"""A teacher on disk: its folder, the base it adapts, and its tensors, read a slice at a time.

Files are mapped, not loaded: a tensor is a view of its file, whose pages come from disk when they
are first touched and are shared by all processes of a machine. Checkpoints are written whole and
never changed in place, which a mapped file must not be.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from posttrain.adapters import find_base, is_adapter
from posttrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a teacher lies: `Place(Path("base"), adapter=Path("lora"))`."""

    base: Path
    adapter: Path | None = None


def find_teacher(folder: Path) -> Place:
    """A checkpoint, or a PEFT adapter and its base: `base_model_name_or_path`, an absolute path or
    one relative to the adapter. Raises CheckpointError where that is no folder."""
    return Place(find_base(folder), folder) if is_adapter(folder) else Place(folder)


class TeacherFiles:
    """One checkpoint's tensors by name. Threads may read at once; what was read keeps its file
    mapped, and nothing else does."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        self._handles: dict[Path, Any] = {}
        self._path_of: dict[str, Path] = {}
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._path_of = {name: folder / file for name, file in weight_map.items()}
        elif single.exists():
            self._path_of = dict.fromkeys(self._open(single).keys(), single)

    @property
    def names(self) -> frozenset[str]:
        """All tensors; none where the checkpoint is not of safetensors files."""
        return frozenset(self._path_of)

    def read(self, name: str) -> Tensor:
        """A view of the file: nothing is read yet, and of a slice of it only the slice ever is."""
        return self._open(self._path_of[name]).get_tensor(name)

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:  # which do not say whose
                raise CheckpointError(f"cannot read {path}: {error}") from error
        return self._handles[path]
