"""Whatever is wrong with a checkpoint in the official layout is named in one message, and nothing
is left behind."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_writer import CONFIG, H, Writer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.backbone import official
from posttrain.backbone.official_files import OfficialError


@pytest.fixture
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Writer]:
    writer = Writer()
    return writer.write(tmp_path_factory.mktemp("official") / "ckpt"), writer


def rename(folder: Path) -> None:
    edit_header(folder, lambda header: {k.replace("wq_a", "wq_x"): v for k, v in header.items()})
    edit_index(folder, lambda m: {k.replace("wq_a", "wq_x"): v for k, v in m.items()})


def drop(folder: Path) -> None:
    tensors, path = read(folder, "layers.2.hc_attn_base")
    del tensors["layers.2.hc_attn_base"]
    save_file(tensors, path)
    edit_index(folder, lambda m: {k: v for k, v in m.items() if k != "layers.2.hc_attn_base"})


def drop_scale(folder: Path) -> None:
    tensors, path = read(folder, "layers.2.attn.wkv.scale")
    del tensors["layers.2.attn.wkv.scale"]
    save_file(tensors, path)
    edit_index(folder, lambda m: {k: v for k, v in m.items() if k != "layers.2.attn.wkv.scale"})


def drop_weight(folder: Path) -> None:
    tensors, path = read(folder, "layers.2.attn.wkv.weight")
    del tensors["layers.2.attn.wkv.weight"]
    save_file(tensors, path)
    edit_index(folder, lambda m: {k: v for k, v in m.items() if k != "layers.2.attn.wkv.weight"})


def reshape(folder: Path) -> None:
    tensors, path = read(folder, "layers.1.ffn.experts.2.w2.weight")
    tensors["layers.1.ffn.experts.2.w2.weight"] = torch.zeros(H, 31, dtype=torch.int8)
    save_file(tensors, path)


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def remove_file(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def add(folder: Path) -> None:
    save_file({"engram.weight": torch.zeros(3)}, folder / "extra.safetensors")
    edit_index(folder, lambda m: {**m, "engram.weight": "extra.safetensors"})


def lose_ratios(folder: Path) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "compress_ratios"}
    (folder / "config.json").write_text(json.dumps(config))


def read(folder: Path, name: str) -> tuple[dict[str, Tensor], Path]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    with safe_open(path, "pt") as file:
        return {n: file.get_tensor(n).clone() for n in file.keys()}, path  # noqa: SIM118


def edit_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.dumps(change(json.loads(data[8:end]))).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, r"layers.0.attn.wq_a.weight is in no file of .*\[64, 128\].*wq_x.* is none of"),
        (drop, r"layers.2.hc_attn_base is in no file of .*expected F32 .*\[24\]"),
        (drop_scale, r"layers.2.attn.wkv.scale is in no file .*F8_E8M0 or F32 \[1, 1\]"),
        (drop_weight, r"^tensor layers.2.attn.wkv.weight is in no file [^;]*$"),
        (
            reshape,
            r"model-0000.*experts.2.w2.weight is I8 \[128, 31\], expected I8 \[128, 32\]",
        ),
        (truncate, r"model-00002-of-00003.safetensors is truncated: tensor \S+ \(.*\) ends at"),
        (remove_file, r"model-00003-of-00003.safetensors is missing: the index names it"),
        (add, r"extra.safetensors: tensor engram.weight \(F32 \[3\]\) is none of"),
        (lose_ratios, r"config.json lacks compress_ratios"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Writer(seed=2).write(tmp_path / "ckpt")
    model = official.load(folder, dtype=torch.bfloat16)
    damage(folder)
    with pytest.raises(OfficialError, match=message):
        official.load(folder, dtype=torch.bfloat16)
    with pytest.raises(OfficialError, match=message):
        official.save(model, tmp_path / "after", template=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_save_that_fails_leaves_nothing(
    written: tuple[Path, Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = official.load(written[0], dtype=torch.bfloat16)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(official, "read_bytes", full)
    with pytest.raises(OSError, match="no space"):
        official.save(model, tmp_path / "after", template=written[0])
    assert not list(tmp_path.iterdir())
    with pytest.raises(OfficialError, match="there already"):
        official.save(model, written[0], template=written[0])
