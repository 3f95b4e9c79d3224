"""Laws of the doctor: it counts what is there, names what is wrong, and says how exact the model
is."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from posttrain.backbone import V4ForCausalLM, official, preset_config
from posttrain.backbone.mtp import add_mtp
from posttrain.checkpoints import save_checkpoint
from posttrain.cli import app
from posttrain.doctor import Examination, examine
from posttrain.errors import CheckpointError
from posttrain.tokenizer import build_tokenizer

WEIGHTS = "model-00001-of-00001.safetensors"


def make() -> Any:
    config = preset_config("tiny", vocab_size=700, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return V4ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in both layouts."""
    folder = tmp_path_factory.mktemp("doctor")
    model = make()
    save_checkpoint(model, build_tokenizer(), folder / "transformers")
    official.save(model, folder / "official")
    return {layout: folder / layout for layout in ("transformers", "official")}


@pytest.mark.parametrize("layout", ["transformers", "official"])
def test_what_is_in_a_checkpoint_is_counted(checkpoints: dict[str, Path], layout: str) -> None:
    folder = checkpoints[layout]
    found = examine(folder, measure=False)
    assert (found.layout, found.model_type, found.problems) == (layout, "deepseek_v4", [])
    router_biases = 2 * 8  # saved, and no parameters
    assert found.num_parameters == sum(p.numel() for p in make().parameters()) + router_biases
    assert found.layers["compressed_sparse_attention"] == 1
    assert (found.layers["hash_moe"], found.layers["moe"]) == (1, 2)
    assert found.divergence is None
    (file,) = found.files
    assert file.sha256 == hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
    header = int.from_bytes((folder / file.name).read_bytes()[:8], "little") + 8
    assert sum(size for _, size in found.tensors.values()) == file.num_bytes - header
    assert ("I8" in found.tensors) == (layout == "official")


def test_padding_changes_nothing_in_ours(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        divergence = examine(folder).divergence
        assert divergence is not None
        assert divergence.largest < 2e-5
        assert divergence.largest_logit > 0.01
        assert divergence.argmax_agreement > 0.99


def lose(tensors: dict[str, Any]) -> str:
    del tensors["layers.1.attn.indexer.wq_b.weight"]
    return r"tensor layers.1.attn.indexer.wq_b.weight is in no file"


def widen(tensors: dict[str, Any]) -> str:
    tensors["layers.2.attn_norm.weight"] = torch.zeros(129, dtype=torch.bfloat16)
    return r"layers.2.attn_norm.weight is BF16 \[129\], expected BF16 .*\[128\]"


def add(tensors: dict[str, Any]) -> str:
    tensors["layers.9.attn_norm.weight"] = torch.zeros(128)
    return r"layers.9.attn_norm.weight \(F32 \[128\]\) is none of this"


def blur(tensors: dict[str, Any]) -> str:
    tensors["embed.weight"] = tensors["embed.weight"] * torch.nan
    return r"gives logits that are no numbers"


@pytest.mark.parametrize("damage", [lose, widen, add, blur])
def test_what_is_wrong_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Callable[[dict[str, Any]], str]
) -> None:
    found = examine_damaged(checkpoints["official"], tmp_path, damage)
    assert len(found.problems) == 1
    with pytest.raises(CheckpointError, match=found.problems[0][:20]):
        found.raise_problems()


def examine_damaged(
    source: Path, folder: Path, damage: Callable[[dict[str, Any]], str]
) -> Examination:
    tensors = load_file(source / WEIGHTS)
    message = damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    found = examine(folder)
    assert re.search(message, found.problems[0]), found.problems
    assert f"PROBLEM  {found.problems[0]}" in found.text()
    return found


def test_transformers_names_and_shapes_are_checked_too(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    def rename(tensors: dict[str, Any]) -> str:
        tensors["model.norm.weigth"] = tensors.pop("model.norm.weight")
        return r"tensor model.norm.weight is in no file"

    found = examine_damaged_transformers(checkpoints["transformers"], tmp_path, rename)
    assert "model.norm.weigth (F32 [128]) is none of the model's" in found.problems[1]


def examine_damaged_transformers(
    source: Path, folder: Path, damage: Callable[[dict[str, Any]], str]
) -> Examination:
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return examine(folder)


def test_a_hash_that_is_not_the_downloads_is_a_problem(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    content = (checkpoints["official"] / WEIGHTS).read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()  # as huggingface_hub's cache has it
    blob.write_bytes(content)
    (folder / "model.safetensors").symlink_to(blob)
    (folder / "config.json").write_bytes((checkpoints["official"] / "config.json").read_bytes())
    assert [f.is_as_downloaded for f in examine(folder, measure=False).files] == [True]
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = examine(folder, measure=False)
    assert "is not the file that was downloaded" in found.problems[0]
    record = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"0123456789abcdef\n{blob.name}\n1700000000.0\n")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    assert [f.is_as_downloaded for f in examine(folder, measure=False).files] == [True]


def test_mtp_tensors_are_counted_and_completed(tmp_path: Path) -> None:
    model = make()
    model.config.num_nextn_predict_layers = 1
    add_mtp(model)
    official.save(model, tmp_path / "whole")
    found = examine(tmp_path / "whole", measure=False)
    assert found.problems == []
    assert found.num_mtp_tensors == sum(
        name.startswith("mtp.") for name in load_file(tmp_path / "whole" / WEIGHTS)
    )

    def lose_one(tensors: dict[str, Any]) -> str:
        del tensors["mtp.0.hnorm.weight"]
        return r"mtp.0.hnorm.weight is in no file"

    (tmp_path / "part").mkdir()
    examine_damaged(tmp_path / "whole", tmp_path / "part", lose_one)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        examine(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        examine(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither the official layout's tensors"):
        examine(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-2])
    with pytest.raises(CheckpointError, match=r"is truncated: tensor a \(F32 \[1\]\)"):
        examine(tmp_path)


def test_the_command_prints_what_the_function_says(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = str(checkpoints["official"])
    result = CliRunner().invoke(app, ["doctor", folder, "--no-measure", "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(
        json.dumps(examine(checkpoints["official"], measure=False).json())
    )
    tensors = load_file(checkpoints["official"] / WEIGHTS)
    lose(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints["official"] / "config.json").read_bytes())
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert "PROBLEM  tensor layers.1.attn.indexer.wq_b.weight is in no file" in result.stdout
    assert result.stderr.startswith("posttrain: tensor layers.1.attn.indexer.wq_b.weight")
    assert result.stderr.count("\n") == 1
