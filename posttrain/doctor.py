"""What is in a checkpoint, in the official layout or transformers', and what is wrong with it.

Headers are read, not numbers, but for two things: each file's hash, and, for a small model, how far
the logits of padded rows are from those of each row alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers import initialization as init
from transformers.models.deepseek_v4 import DeepseekV4Config

from posttrain.backbone import V4ForCausalLM, official
from posttrain.backbone.mtp import add_mtp
from posttrain.backbone.official_config import from_official
from posttrain.backbone.official_files import Entry, OfficialError, read_entries, read_json
from posttrain.backbone.official_names import find_problems, places
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError

MEASURED_PARAMETERS = 500_000_000
"""A model up to this size is loaded and measured unless told otherwise: 2 GB in float32."""

ROW_LENGTHS = (3, 40, 200)
"""Beyond the released window and both compression rates, and below them."""

NAMED_PROBLEMS = 5
"""How many problems the error's one line has; the report has them all."""

KINDS = {"I8": "MXFP4 (I8)", "F8_E4M3": "FP8 (F8_E4M3)", "F8_E8M0": "scales (F8_E8M0)"}
SHA256 = re.compile(r"[0-9a-f]{64}")

Layout = Literal["official", "transformers"]


@dataclass(frozen=True)
class FileFacts:
    """A file: `FileFacts("model.safetensors", 4096, "9f86...", is_as_downloaded=True)`."""

    name: str
    num_bytes: int
    sha256: str
    is_as_downloaded: bool | None
    """Whether the hash is the one the hub gave for it; None where none was kept."""


@dataclass(frozen=True)
class Divergence:
    """Logits of rows padded left and right in one batch, against each row alone, in float32."""

    largest: float
    """The largest difference of any logit of a real token."""
    largest_logit: float
    argmax_agreement: float
    """Share of tokens whose most likely next token is the same."""


@dataclass(frozen=True)
class Examination:
    """What was found; `problems` is empty where all is well."""

    folder: str
    layout: Layout
    model_type: str
    num_parameters: int
    """Of the model, two to a byte in FP4; scales and hash tables aside."""
    tensors: dict[str, tuple[int, int]]
    """Dtype to number of tensors and bytes."""
    layers: dict[str, int]
    """Kind to number of layers."""
    num_mtp_tensors: int
    files: list[FileFacts]
    divergence: Divergence | None
    problems: list[str]

    def json(self) -> dict[str, Any]:
        """The same facts for machines."""
        tensors = {k: {"tensors": n, "bytes": size} for k, (n, size) in self.tensors.items()}
        return {**asdict(self), "tensors": tensors}

    def text(self) -> str:
        """The same facts to read."""
        lines = [
            f"{self.folder}: {self.model_type} in the {self.layout} layout, "
            f"{self.num_parameters:,} parameters, {_size(sum(n for _, n in self.tensors.values()))}"
        ]
        lines += [f"  layers   {number:>6}  {kind}" for kind, number in self.layers.items()]
        lines += [
            f"  tensors  {number:>6}  {KINDS.get(dtype, dtype):<18} {_size(num_bytes):>10}"
            for dtype, (number, num_bytes) in self.tensors.items()
        ]
        if self.num_mtp_tensors:
            lines.append(f"  of them  {self.num_mtp_tensors:>6}  multi-token prediction (mtp.*)")
        downloaded = {None: "", True: "  as downloaded", False: "  NOT as downloaded"}
        lines += [
            f"  file     {f.name}  {_size(f.num_bytes)}  sha256 {f.sha256}"
            f"{downloaded[f.is_as_downloaded]}"
            for f in self.files
        ]
        if self.divergence is None:
            lines.append("  padded against single rows: not measured")
        else:
            found = self.divergence
            lines.append(
                f"  padded against single rows: logits differ by {found.largest:.1e} at most "
                f"(largest {found.largest_logit:.2g}), argmax agrees on "
                f"{found.argmax_agreement:.1%}"
            )
        lines += [f"  PROBLEM  {problem}" for problem in self.problems]
        return "\n".join(lines)

    def raise_problems(self) -> None:
        """Raise CheckpointError where there are any."""
        if self.problems:
            more = len(self.problems) - NAMED_PROBLEMS
            rest = f"; and {more} more" if more > 0 else ""
            raise CheckpointError("; ".join(self.problems[:NAMED_PROBLEMS]) + rest)


def examine(folder: Path, *, measure: bool | None = None) -> Examination:
    """Look through a checkpoint.

    Args:
        folder: config.json and safetensors files.
        measure: load the model and compare padded with single rows; None: if it is small.

    Raises:
        CheckpointError: no checkpoint there, or files that cannot be read: missing, truncated or
            no safetensors.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no checkpoint: there is no config.json")
    try:
        entries = read_entries(folder)
        layout = _layout(entries, folder)
        config, problems = _check_tensors(folder, layout, entries)
    except OfficialError as error:
        raise CheckpointError(str(error)) from None
    files = [_file_facts(path) for path in sorted({entry.file for entry in entries.values()})]
    problems += [_strange(folder / f.name, f) for f in files if f.is_as_downloaded is False]
    num_parameters = _num_parameters(entries)
    divergence = None
    wanted = num_parameters <= MEASURED_PARAMETERS if measure is None else measure
    if wanted and not problems:
        divergence = measure_divergence(_load(folder, layout))
        if not math.isfinite(divergence.largest):
            divergence = None
            problems.append(f"the model in {folder} gives logits that are no numbers")
    return Examination(
        folder=str(folder),
        layout=layout,
        model_type=str(config.model_type),
        num_parameters=num_parameters,
        tensors=_by_dtype(entries.values()),
        layers=_layers(config),
        num_mtp_tensors=sum(name.startswith("mtp.") for name in entries),
        files=files,
        divergence=divergence,
        problems=problems,
    )


@torch.no_grad()
def measure_divergence(model: Any, *, seed: int = 0) -> Divergence:
    """Rows of random tokens, each alone and all in one batch, padded on both sides."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size: int = model.config.vocab_size
    rows = [torch.randint(0, vocab_size, (n,), generator=generator) for n in ROW_LENGTHS]
    width = max(ROW_LENGTHS) + 5
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    starts = [(width - len(row)) // 2 for row in rows]  # padding left and right of every row
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    together = model(input_ids=ids, attention_mask=mask).logits.float()
    difference: list[Tensor] = []
    agrees: list[Tensor] = []
    largest = 0.0
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        alone = model(input_ids=row[None]).logits[0].float()
        padded = together[i, start : start + len(row)]
        difference.append((alone - padded).abs().flatten())
        agrees.append(alone.argmax(-1) == padded.argmax(-1))
        largest = max(largest, alone.abs().max().item())
    return Divergence(
        torch.cat(difference).max().item(), largest, torch.cat(agrees).float().mean().item()
    )


def _layout(entries: Mapping[str, Entry], folder: Path) -> Layout:
    if any(name.startswith("layers.") for name in entries):
        return "official"
    if any(name.startswith("model.") for name in entries):
        return "transformers"
    raise OfficialError(
        f"{folder} has neither the official layout's tensors (layers.0.*) nor those of "
        "transformers (model.*)"
    )


def _check_tensors(
    folder: Path, layout: Layout, entries: Mapping[str, Entry]
) -> tuple[Any, list[str]]:
    """The configuration, and what is wrong with the tensors by it."""
    if layout == "official":
        config = from_official(read_json(folder / "config.json"))
        has_mtp = any(name.startswith("mtp.") for name in entries)
        wanted = places(_shapes(config, has_mtp=has_mtp))
        return config, find_problems(entries, wanted, directory=folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(config, DeepseekV4Config):
        return config, []  # other architectures rename on loading: load_model says what is amiss
    return config, _transformers_problems(entries, _shapes(config), folder)


def _shapes(config: DeepseekV4Config, *, has_mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's state dict, without its numbers."""
    with init.no_init_weights(), torch.device("meta"):
        model = V4ForCausalLM(config)
        if has_mtp:
            add_mtp(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _transformers_problems(
    entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> list[str]:
    problems = [
        f"tensor {name} is in no file of {folder}: expected {list(shape)}"
        for name, shape in shapes.items()
        if name not in entries
    ]
    for name, entry in entries.items():
        if name not in shapes and not name.startswith("mtp."):
            problems.append(f"{entry.file}: tensor {name} ({entry.words}) is none of the model's")
        elif name in shapes and entry.shape != shapes[name]:
            problems.append(
                f"{entry.file}: tensor {name} is {entry.words}, expected {list(shapes[name])}"
            )
    return problems


def _load(folder: Path, layout: Layout) -> Any:
    if layout == "official":
        return official.load(folder, dtype=torch.float32)
    return load_model(folder)


def _num_parameters(entries: Mapping[str, Entry]) -> int:
    scales = {name.removesuffix(".weight") + ".scale" for name in entries}
    return sum(
        math.prod(entry.shape) * (2 if entry.dtype == "I8" else 1)
        for name, entry in entries.items()
        if name not in scales and not name.endswith(".tid2eid")
    )


def _by_dtype(entries: Any) -> dict[str, tuple[int, int]]:
    number: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for entry in entries:
        number[entry.dtype] += 1
        num_bytes[entry.dtype] += entry.stop - entry.start
    return {dtype: (number[dtype], size) for dtype, size in num_bytes.most_common()}


def _layers(config: Any) -> dict[str, int]:
    kinds: Sequence[str] = [
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "mlp_layer_types", None) or ()),
    ]
    return dict(Counter(kinds)) or {"layers": config.num_hidden_layers}


def _file_facts(path: Path) -> FileFacts:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = _hub_hash(path)
    return FileFacts(
        path.name, path.stat().st_size, found, None if wanted is None else wanted == found
    )


def _strange(path: Path, facts: FileFacts) -> str:
    return f"{path} is not the file that was downloaded: its sha256 is {facts.sha256}"


def _hub_hash(path: Path) -> str | None:
    """What huggingface_hub keeps of a download: in its cache the blob's name, in a folder of its
    own the second line of .cache/huggingface/download/NAME.metadata. Small files have another."""
    if path.is_symlink() and SHA256.fullmatch(path.resolve().name):
        return path.resolve().name
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    words = record.read_text().split() if record.is_file() else []
    return next((word for word in words if SHA256.fullmatch(word)), None)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
