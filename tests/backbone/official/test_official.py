"""Laws of the official layout: what it holds is what is loaded, what is loaded is what is saved,
and whatever is wrong with it is named."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official_writer import CONFIG, EXPERTS, INTER, VOCAB, Writer
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM, official, preset_config
from posttrain.backbone.fp4 import fake_mxfp4
from posttrain.backbone.mtp import add_mtp
from posttrain.backbone.official_config import from_official, to_official
from posttrain.backbone.official_files import OfficialError
from posttrain.backbone.official_names import places, stored
from posttrain.checkpoints import load_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Writer]:
    writer = Writer()
    return writer.write(tmp_path_factory.mktemp("official") / "ckpt"), writer


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, read by safetensors itself."""
    found: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                raw: Any = file.get_tensor(name).flatten().view(torch.uint8).numpy()
                found[name] = raw.tobytes()
    return found


def in_model(model: Any, values: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Official name to (what the model has, what it should have), each written out by hand."""
    state, pairs = model.state_dict(), {}
    plain = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "hc_head_fn": "model.hc_head.hc_fn",
        "layers.0.attn.attn_sink": "model.layers.0.self_attn.sinks",
        "layers.0.attn.wo_a.weight": "model.layers.0.self_attn.o_a_proj.weight",
        "layers.0.ffn.gate.tid2eid": "model.layers.0.mlp.gate.tid2eid",
        "layers.1.attn.indexer.wq_b.weight": (
            "model.layers.1.self_attn.compressor.indexer.q_b_proj.weight"
        ),
        "layers.1.attn.indexer.compressor.ape": (
            "model.layers.1.self_attn.compressor.indexer.position_bias"
        ),
        "layers.2.attn.compressor.norm.weight": (
            "model.layers.2.self_attn.compressor.kv_norm.weight"
        ),
        "layers.2.ffn.gate.bias": "model.layers.2.mlp.gate.e_score_correction_bias",
        "layers.3.ffn.shared_experts.w2.weight": (
            "model.layers.3.mlp.shared_experts.down_proj.weight"
        ),
        "layers.3.hc_ffn_scale": "model.layers.3.ffn_hc.scale",
        "layers.3.ffn_norm.weight": "model.layers.3.post_attention_layernorm.weight",
    }
    for official_name, name in plain.items():
        pairs[official_name] = (state[name], values[official_name])
    for expert in range(EXPERTS):
        prefix, mine = f"layers.2.ffn.experts.{expert}.", "model.layers.2.mlp.experts."
        gate_up = state[f"{mine}gate_up_proj"][expert]
        pairs[f"{prefix}w1.weight"] = (gate_up[:INTER], values[f"{prefix}w1.weight"])
        pairs[f"{prefix}w3.weight"] = (gate_up[INTER:], values[f"{prefix}w3.weight"])
        down = state[f"{mine}down_proj"][expert]
        pairs[f"{prefix}w2.weight"] = (down, values[f"{prefix}w2.weight"])
    return pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_bits_say_is_what_is_loaded(
    written: tuple[Path, Writer], dtype: torch.dtype
) -> None:
    folder, writer = written
    model = official.load(folder, dtype=dtype)
    assert isinstance(model, V4ForCausalLM)
    assert not model.training
    assert model.generation_config is not None
    assert model.generation_config.temperature == 0.25
    for name, (found, wanted) in in_model(model, writer.values).items():
        assert torch.equal(found.to(torch.float64), wanted.to(torch.float64)), name


def test_float32_scales_of_the_base_variant(tmp_path: Path) -> None:
    writer = Writer(is_base=True)
    model = official.load(writer.write(tmp_path / "base"), dtype=torch.float32)
    for name, (found, wanted) in in_model(model, writer.values).items():
        assert torch.equal(found.double(), wanted.double()), name
    with pytest.raises(OfficialError, match=r"keep_fp4: .* no FP4 to keep"):
        official.load(tmp_path / "base", dtype=torch.float32, keep_fp4=True)


def test_stock_reads_the_same_numbers_from_what_we_save(
    written: tuple[Path, Writer], tmp_path: Path
) -> None:
    folder, _ = written
    trained = official.load(folder, dtype=torch.float32)
    with torch.no_grad():
        for name in ("self_attn.q_a_proj.weight", "mlp.experts.gate_up_proj", "attn_hc.scale"):
            trained.get_parameter(f"model.layers.1.{name}").mul_(1.3)
    (tmp_path / "saved").mkdir()  # an empty folder is none in the way
    official.save(trained, tmp_path / "saved", template=folder)
    assert_stock_reads_the_same(tmp_path / "saved")


def assert_stock_reads_the_same(folder: Path) -> None:
    ours = official.load(folder, dtype=torch.bfloat16)
    auto: Any = DeepseekV4ForCausalLM
    stock, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("mtp.") for name in info["unexpected_keys"])
    state = stock.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name].float(), tensor.float()), name
    # and the buffers that no file holds
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, stock.get_buffer(name)), name


def test_a_run_loads_either_layout_in_the_dtype_it_asks_for(
    written: tuple[Path, Writer], tmp_path: Path
) -> None:
    wanted = official.load(written[0], dtype=torch.float32)
    wanted.save_pretrained(tmp_path)
    for folder in (written[0], tmp_path):
        found = load_model(folder).state_dict()
        for name, tensor in wanted.state_dict().items():
            assert tensor.dtype == found[name].dtype, name
            assert torch.equal(tensor, found[name]), name


def test_dtypes_are_those_of_from_pretrained(written: tuple[Path, Writer], tmp_path: Path) -> None:
    ours = official.load(written[0], dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == loaded[name].dtype, name
        assert torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_base", [False, True])
@pytest.mark.parametrize("with_mtp", [False, True])
def test_load_and_save_give_the_same_files(
    tmp_path: Path, dtype: torch.dtype, is_base: bool, with_mtp: bool
) -> None:
    folder = Writer(is_base=is_base, seed=1).write(tmp_path / "before")
    model = official.load(folder, dtype=dtype, with_mtp=with_mtp)
    official.save(model, tmp_path / "after", template=folder)
    assert hashes(tmp_path / "after") == hashes(folder)


@pytest.mark.parametrize("is_base", [False, True])
def test_a_reader_gives_each_tensor_that_loading_gives(tmp_path: Path, *, is_base: bool) -> None:
    folder = Writer(is_base=is_base, seed=1).write(tmp_path / "before")
    model: Any = official.load(folder, dtype=torch.bfloat16, with_mtp=True)
    read = official.reader(folder, model.to("meta"))
    wanted = official.load(folder, dtype=torch.bfloat16, with_mtp=True).state_dict()
    assert all(torch.equal(read(name), tensor) for name, tensor in wanted.items())


def test_packed_experts_save_as_they_came(written: tuple[Path, Writer], tmp_path: Path) -> None:
    folder, _ = written
    packed = official.load(folder, dtype=torch.float32, keep_fp4=True)
    official.save(packed, tmp_path / "after", template=folder)
    assert hashes(tmp_path / "after") == hashes(folder)
    ids = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = official.load(folder, dtype=torch.float32)
        assert torch.equal(packed(ids).logits, whole(ids).logits)


def test_the_mtp_block_is_loaded_where_asked_for(written: tuple[Path, Writer]) -> None:
    folder, writer = written
    model: Any = official.load(folder, dtype=torch.float32, with_mtp=True)
    block = model.mtp[0]
    assert not any(parameter.requires_grad for parameter in block.parameters())
    for name, found in {
        "e_proj.weight": block.e_proj.weight,
        "hnorm.weight": block.hnorm.weight,
        "hc_head_fn": block.hc_head.hc_fn,
        "attn.wkv.weight": block.self_attn.kv_proj.weight,
        "ffn.experts.1.w2.weight": block.mlp.experts.down_proj[1],
    }.items():
        assert torch.equal(found.double(), writer.values[f"mtp.0.{name}"].double()), name


def test_a_training_step_changes_only_what_it_trained(
    written: tuple[Path, Writer], tmp_path: Path
) -> None:
    folder, _ = written
    model: Any = official.load(folder, dtype=torch.float32)
    trained = {
        "model.layers.2.self_attn.q_a_proj.weight": ["layers.2.attn.wq_a.weight"],
        "model.layers.1.mlp.experts.down_proj": [
            f"layers.1.ffn.experts.{e}.w2.weight" for e in range(EXPERTS)
        ],
        "model.layers.3.input_layernorm.weight": ["layers.3.attn_norm.weight"],
        "model.layers.0.attn_hc.fn": ["layers.0.hc_attn_fn"],
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    ids = torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    model.train()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    official.save(model, tmp_path / "after", template=folder)
    before, after = contents(folder), contents(tmp_path / "after")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    wanted = {name for names in trained.values() for name in names}
    assert wanted <= changed <= wanted | {n.replace(".weight", ".scale") for n in wanted}
    again = official.load(tmp_path / "after", dtype=torch.float32)
    down = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(again.get_parameter(down), fake_mxfp4(model.get_parameter(down).detach()))
    assert "tokenizer.json" in hashes(tmp_path / "after")
    assert_stock_reads_the_same(tmp_path / "after")


def test_a_model_from_nothing_saves_without_a_template(tmp_path: Path) -> None:
    config = preset_config("tiny", vocab_size=96, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = V4ForCausalLM(config).eval()
    official.save(model, tmp_path / "first")
    loaded = official.load(tmp_path / "first", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        error = (loaded.state_dict()[name].double() - tensor.double()).abs().max().item()
        assert error <= 0.2 * tensor.double().abs().max().item(), name  # FP4's coarsest step
    official.save(loaded, tmp_path / "second", template=tmp_path / "first")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    official.save(loaded, tmp_path / "third")  # other codes perhaps (3 at 2 is 6 at 1), no others
    third = official.load(tmp_path / "third", dtype=torch.float32).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(third[name], tensor), name
    for name in ("layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"):
        assert getattr(loaded.config, name) == getattr(config, name), name


def test_many_files_where_one_would_be_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(official, "SHARD_BYTES", 100_000)
    model = official.load(Writer().write(tmp_path / "one"), dtype=torch.float32)
    official.save(model, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    sizes = [path.stat().st_size for path in files]
    assert all(a + b > 100_000 for a, b in itertools.pairwise(sizes))  # no file too many
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    again = official.load(tmp_path / "many", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_config_says_what_stock_reads_from_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    stock: Any = DeepseekV4Config.from_pretrained(tmp_path)
    del stock.rope_parameters["compress"]["type"]  # the old word, beside the new one
    ours = from_official(CONFIG)
    for name in (
        "layer_types",
        "mlp_layer_types",
        "compress_rates",
        "rope_parameters",
        "partial_rotary_factor",
        "qk_rope_head_dim",
        "num_nextn_predict_layers",
        "head_dim",
        "eos_token_id",
    ):
        assert getattr(ours, name) == getattr(stock, name), name
    back = to_official(ours)
    for name, value in CONFIG.items():
        assert back.get(name, value) == value, name


def test_a_changed_config_changes_only_its_fields(
    written: tuple[Path, Writer], tmp_path: Path
) -> None:
    model = official.load(written[0], dtype=torch.float32)
    model.config.eos_token_id = 7
    official.save(model, tmp_path / "after", template=written[0])
    found = json.loads((tmp_path / "after" / "config.json").read_text())
    assert found == {**CONFIG, "eos_token_id": 7}


FLASH = {
    "num_hidden_layers": 4,
    "compress_ratios": [0, 0, 4, 128, 0],  # of 43 layers the first, and the MTP block
    "num_hash_layers": 3,
    "hidden_size": 4096,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "vocab_size": 129280,
}

FLASH_TENSORS: dict[str, tuple[str | int, ...]] = {
    "embed.weight": ("BF16", 129280, 4096),
    "hc_head_fn": ("F32", 4, 16384),
    "layers.0.attn.attn_sink": ("F32", 64),
    "layers.0.attn.wo_a.weight": ("F8_E4M3", 8192, 4096),
    "layers.0.attn.wo_a.scale": ("F8_E8M0", 64, 32),
    "layers.0.ffn.gate.tid2eid": ("I64", 129280, 6),
    "layers.2.attn.compressor.ape": ("F32", 4, 1024),
    "layers.3.attn.compressor.ape": ("F32", 128, 512),
    "layers.2.attn.indexer.wq_b.weight": ("F8_E4M3", 8192, 1024),
    "layers.2.attn.indexer.weights_proj.weight": ("BF16", 64, 4096),
    "layers.2.attn.indexer.compressor.wgate.weight": ("BF16", 256, 4096),
    "layers.3.ffn.experts.7.w1.weight": ("I8", 2048, 2048),
    "layers.3.ffn.experts.7.w1.scale": ("F8_E8M0", 2048, 128),
    "layers.3.ffn.experts.255.w2.weight": ("I8", 4096, 1024),
    "layers.3.ffn.experts.255.w2.scale": ("F8_E8M0", 4096, 64),
    "layers.1.hc_ffn_fn": ("F32", 24, 16384),
    "mtp.0.h_proj.scale": ("F8_E8M0", 32, 32),
    "mtp.0.ffn.gate.bias": ("F32", 256),
}


def test_the_released_flash_has_these_tensors() -> None:
    config = from_official({**CONFIG, **FLASH})
    with init.no_init_weights(), torch.device("meta"):
        model = V4ForCausalLM(config)
        add_mtp(model)
    wanted = places({name: tuple(t.shape) for name, t in model.state_dict().items()})
    found = {
        name: (dtypes[0], *shape)
        for place in wanted
        for name, (dtypes, shape) in stored(place, place.dtype).items()
    }
    assert sum(name.startswith("mtp.") for name in found) == 1575  # as in the release's index
    for name, tensor in FLASH_TENSORS.items():
        assert found[name] == tensor, name
    assert "layers.0.attn.compressor.ape" not in found
    assert "layers.3.attn.indexer.wq_b.weight" not in found


def test_the_layout_is_known_by_its_config(written: tuple[Path, Writer], tmp_path: Path) -> None:
    assert official.is_official(written[0])
    assert not official.is_official(tmp_path)
    official.load(written[0], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert not official.is_official(tmp_path)


def test_what_the_layout_has_no_name_for_is_refused(
    written: tuple[Path, Writer], tmp_path: Path
) -> None:
    model: Any = official.load(written[0], dtype=torch.bfloat16)
    model.model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(OfficialError, match=r"no name for model\.adapter\.weight"):
        official.save(model, tmp_path / "after", template=written[0])
