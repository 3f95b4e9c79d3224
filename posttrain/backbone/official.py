"""DeepSeek-V4 checkpoints as released: read into a V4ForCausalLM and written back, one tensor at a
time, so that memory peaks at the model and one tensor.

`save` takes a template, the checkpoint the model came from: a tensor whose number the model still
has is copied from it byte for byte, and only what training changed is quantised anew, in the
template's own dtypes. `mtp.*` that the model does not hold goes through untouched.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import initialization as init

from posttrain.backbone.fp4 import (
    E4M3,
    E8M0,
    dequantize_fp8,
    dequantize_mxfp4,
    quantize_fp8,
    quantize_mxfp4,
)
from posttrain.backbone.fp4_experts import PackedWeight, pack_experts
from posttrain.backbone.model import V4ForCausalLM
from posttrain.backbone.mtp import add_mtp
from posttrain.backbone.official_config import changed_config, from_official
from posttrain.backbone.official_files import (
    DTYPES,
    INDEX,
    Entry,
    OfficialError,
    appearing,
    copy_header,
    copy_others,
    make_header,
    read_bytes,
    read_entries,
    read_header,
    read_json,
    read_tensor,
    tensor_bytes,
    write_file,
)
from posttrain.backbone.official_names import Place, find_problems, places, stored

SHARD_BYTES = 5 * 2**30
"""Size at which a new file is begun where no template says."""

Held = Mapping[str, "Tensor | PackedWeight"]


def is_official(directory: str | Path) -> bool:
    """Whether a folder's config.json is the official layout's: transformers writes no
    compress_ratios."""
    path = Path(directory) / "config.json"
    return path.is_file() and "compress_ratios" in read_json(path)


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype,
    keep_fp4: bool = False,
    with_mtp: bool = False,
) -> V4ForCausalLM:
    """The model of an official checkpoint, in eval mode, on the CPU.

    Args:
        directory: config.json and safetensors files in the official layout.
        dtype: float32 or bfloat16, both exact for FP8 with E8M0 scales and for FP4. Norms, sinks,
            mHC and what else V4 keeps in float32 is float32 in either.
        keep_fp4: routed experts stay packed, for inference (`fp4_experts`).
        with_mtp: give the model its MTP block too, as `model.mtp[0]`; frozen, for speculation,
            unless the config has an `mtp_loss_weight`.

    Raises:
        OfficialError: anything missing, truncated, unknown or of another shape, all named.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}: load in float32 or bfloat16, which hold FP8 and FP4")
    folder = Path(directory)
    model = _empty_model(folder, dtype)
    if with_mtp:
        add_mtp(model).requires_grad_(bool(model.config.mtp_loss_weight))
    if keep_fp4:
        pack_experts(model, is_filled=False)
    fill(model, folder, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, directory: Path, *, dtype: torch.dtype) -> None:
    """Read every parameter and saved buffer of a model from an official checkpoint.

    Raises:
        OfficialError: as `load`; nothing has been read then.
    """
    entries = read_entries(directory)
    _set_dtypes(model, dtype)
    held = held_tensors(model)
    wanted = places({name: tuple(value.shape) for name, value in held.items()})
    refuse(find_problems(entries, wanted, directory=directory))
    _refuse_unpackable(held, wanted, entries)
    # in the files' order: a disk then reads forward
    for place in sorted(wanted, key=lambda place: _order(entries[place.official])):
        target = held[place.model]
        if isinstance(target, PackedWeight):
            expert, rows = place.index
            assert isinstance(expert, int)
            assert isinstance(rows, slice)
            codes, scale = _raw(entries, place)
            assert scale is not None
            target.put(expert, rows, codes, scale)
        else:
            target[place.index].copy_(decode(*_raw(entries, place), dtype=target.dtype))


def read_config(directory: str | Path) -> Any:
    """The configuration of the model that an official checkpoint is of."""
    return from_official(read_json(Path(directory) / "config.json"))


def reader(directory: str | Path, skeleton: nn.Module) -> Callable[[str], Tensor]:
    """For a model without weights (on the meta device, say): a function that reads one tensor of
    an official checkpoint by the model's name for it, in the model's dtype.

    Raises:
        OfficialError: as `load`.
    """
    folder, held = Path(directory), skeleton.state_dict()
    entries = read_entries(folder)
    wanted = places({name: tuple(value.shape) for name, value in held.items()})
    refuse(find_problems(entries, wanted, directory=folder))
    of: dict[str, list[Place]] = defaultdict(list)
    for place in wanted:
        of[place.model].append(place)

    def read(name: str) -> Tensor:
        found = torch.empty(held[name].shape, dtype=held[name].dtype)
        for place in of[name]:
            found[place.index].copy_(decode(*_raw(entries, place), dtype=found.dtype))
        return found

    return read


def save(model: nn.Module, directory: str | Path, *, template: str | Path | None = None) -> None:
    """Write a model in the official layout; `directory` appears whole or not at all.

    Args:
        model: a V4ForCausalLM, its experts packed or not. Quantising from float32 parameters is
            right; near 1% of the FP4 codes come out another way through bfloat16.
        directory: must not exist, or be empty.
        template: the official checkpoint it was loaded from: its files, dtypes, config.json and
            mtp.* are kept but for what the model has changed. Without one, the released dtypes.

    Raises:
        OfficialError: the template is not of this model, or there is no such layout.
    """
    held = held_tensors(model)
    wanted = places({name: tuple(value.shape) for name, value in held.items()})
    source = None if template is None else Path(template)
    found = None if source is None else read_json(source / "config.json")
    config = changed_config(found, model.config)  # pyright: ignore[reportArgumentType]
    if source is not None:
        entries = read_entries(source)
        refuse(find_problems(entries, wanted, directory=source))
    with appearing(Path(directory)) as folder:
        if source is None:
            _write_new(folder, held, wanted)
        else:
            _write_like(folder, source, held, wanted)
            copy_others(source, folder, written=lambda name: name == "config.json")
        same = source is not None and config is found
        text = (source / "config.json").read_bytes() if same and source else _text(config)
        write_file(folder / "config.json", [text])


def held_tensors(model: nn.Module) -> dict[str, Tensor | PackedWeight]:
    """The state dict by name, packed experts under the name of the parameter they stand for."""
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    inside = {f"{name}.{part}" for name in packed for part in ("codes", "scale")}
    state: dict[str, Tensor] = model.state_dict()
    held = {name: value for name, value in state.items() if name not in inside}
    return {**held, **{f"{name}_proj": weight for name, weight in packed.items()}}


def decode(stored: Tensor, scale: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """The numbers of a stored tensor: FP4 pairs or e4m3 with their scale, or itself."""
    if scale is None:
        return stored.to(dtype)
    if stored.dtype == E4M3:
        return dequantize_fp8(stored, scale, dtype=dtype)
    return dequantize_mxfp4(stored, scale, dtype=dtype)


def encode(value: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype | None) -> list[Tensor]:
    """The stored tensor and, in FP8 and FP4, its scale."""
    if dtype == E4M3:
        return list(quantize_fp8(value, scale_dtype=scale_dtype or E8M0))
    if dtype == torch.int8:
        return list(quantize_mxfp4(value))
    return [value.to(dtype)]


def refuse(problems: Sequence[str]) -> None:
    """Raise one error for all problems, the first ten in words."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise OfficialError("; ".join(problems[:10]) + more)


def _empty_model(folder: Path, dtype: torch.dtype) -> V4ForCausalLM:
    config = read_config(folder)
    auto: Any = AutoModelForCausalLM
    with init.no_init_weights():  # every number comes from the files, or load raises
        return auto.from_config(config, dtype=dtype)


def _set_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """What transformers does while it loads: `dtype`, but float32 where the class says so."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            keeps = not names.isdisjoint(name.split("."))
            tensor.data = tensor.data.to(torch.float32 if keeps else dtype)


def _raw(entries: Mapping[str, Entry], place: Place) -> tuple[Tensor, Tensor | None]:
    entry = entries[place.official]
    scaled = place.scale in stored(place, entry.dtype)
    return read_tensor(entry), read_tensor(entries[place.scale]) if scaled else None


def _order(entry: Entry) -> tuple[str, int]:
    return entry.file.name, entry.start


def _refuse_unpackable(held: Held, wanted: Sequence[Place], entries: Mapping[str, Entry]) -> None:
    for place in wanted:
        entry = entries[place.official]
        if isinstance(held[place.model], PackedWeight) and entry.dtype != "I8":
            raise OfficialError(
                f"keep_fp4: {entry.file} has {place.official} in {entry.dtype}, no FP4 to keep; "
                "load without keep_fp4 (and pack_experts, to quantise)"
            )


def _write_like(folder: Path, source: Path, held: Held, wanted: Sequence[Place]) -> None:
    """The template's files again: same names, same headers, changed tensors in their places."""
    entries = read_entries(source)
    place_of = {place.official: place for place in wanted}
    place_of |= {
        place.scale: place
        for place in wanted
        if place.scale in stored(place, entries[place.official].dtype)
    }
    for file in sorted({entry.file for entry in entries.values()}):
        write_file(folder / file.name, _parts_like(file, entries, place_of, held))


def _parts_like(
    file: Path, entries: Mapping[str, Entry], place_of: Mapping[str, Place], held: Held
) -> Iterator[bytes | bytearray | memoryview]:
    waiting: dict[str, Tensor | None] = {}  # scales of weights that are written; they are small
    yield copy_header(file)
    for name, entry in read_header(file).items():
        place = place_of.get(name)
        if place is None:
            yield read_bytes(entry)
            continue
        if name not in waiting:
            new = _changed(_number(held, place), place, entries)
            parts = stored(place, entries[place.official].dtype)
            waiting |= dict(zip(parts, new or [None] * len(parts), strict=True))
        tensor = waiting.pop(name)
        waiting.pop(place.official, None)  # a scale that came first: its weight is made again
        yield read_bytes(entry) if tensor is None else tensor_bytes(tensor)


def _changed(number: Tensor, place: Place, entries: Mapping[str, Entry]) -> list[Tensor] | None:
    """What to store where the template's tensor and scale are; None where they say the same."""
    tensor, scale = _raw(entries, place)
    if torch.equal(decode(tensor, scale, dtype=number.dtype), number):
        return None
    return encode(number, tensor.dtype, None if scale is None else scale.dtype)


def _number(held: Held, place: Place) -> Tensor:
    value = held[place.model]
    if not isinstance(value, PackedWeight):
        return value[place.index].detach().cpu()
    expert, rows = place.index
    assert isinstance(expert, int)
    return value[expert][rows].cpu()


def _write_new(folder: Path, held: Held, wanted: Sequence[Place]) -> None:
    """Files of at most SHARD_BYTES and their index, in the released checkpoints' dtypes."""
    # widest first: readers map the bytes, and want each number at a multiple of its size
    ordered = sorted(wanted, key=lambda place: -DTYPES[place.dtype].itemsize)
    shards: list[list[Place]] = [[]]
    size = 0
    for place in ordered:
        bytes_here = sum(_sizes(place).values())
        if shards[-1] and size + bytes_here > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += bytes_here
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, _parts_new(shard, held))
        weight_map |= {name: file for place in shard for name in _sizes(place)}
    total = sum(sum(_sizes(place).values()) for place in wanted)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, [_text(index)])


def _parts_new(shard: Sequence[Place], held: Held) -> Iterator[bytes | memoryview]:
    yield make_header(
        {
            name: (dtypes[0], shape)
            for place in shard
            for name, (dtypes, shape) in stored(place, place.dtype).items()
        }
    )
    for place in shard:
        for tensor in encode(_number(held, place), DTYPES[place.dtype], E8M0):
            yield tensor_bytes(tensor)


def _sizes(place: Place) -> dict[str, int]:
    """Bytes of a place's tensors, in the released dtypes."""
    return {
        name: math.prod(shape) * DTYPES[dtypes[0]].itemsize
        for name, (dtypes, shape) in stored(place, place.dtype).items()
    }


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
