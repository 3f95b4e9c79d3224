"""A small checkpoint in the official layout, written from the layout's description alone."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H, VOCAB, HEADS, DIM, ROPE = 128, 160, 4, 32, 16
Q_LORA, O_GROUPS, O_LORA, INTER, EXPERTS, TOP = 64, 2, 64, 64, 4, 2
INDEX_HEADS, INDEX_DIM, HC = 16, 16, 4
RATIOS = [0, 4, 128, 4, 0]  # the last is the MTP block's

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "compress_ratios": RATIOS,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": HC,
    "hc_sinkhorn_iters": 20,
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": H,
    "index_head_dim": INDEX_DIM,
    "index_n_heads": INDEX_HEADS,
    "index_topk": 8,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": INTER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP,
    "num_hash_layers": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": O_GROUPS,
    "o_lora_rank": O_LORA,
    "q_lora_rank": Q_LORA,
    "qk_rope_head_dim": ROPE,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 16,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}


class Writer:
    """A checkpoint of random numbers written tensor by tensor from the released layout's
    description, and beside each the number it stands for, from its bits."""

    def __init__(self, *, is_base: bool = False, seed: int = 0) -> None:
        self.g = torch.Generator().manual_seed(seed)
        self.is_base = is_base
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.plain("embed.weight", (VOCAB, H), torch.bfloat16)
        for layer, ratio in enumerate(RATIOS[:-1]):
            self.block(f"layers.{layer}.", ratio, is_hash=layer < 2)
        self.block("mtp.0.", RATIOS[-1], is_hash=False)
        for name in ("e_proj", "h_proj"):
            self.fp8(f"mtp.0.{name}", H, H)
        for name in ("enorm", "hnorm", "norm"):
            self.plain(f"mtp.0.{name}.weight", (H,), torch.bfloat16)
        self.plain("norm.weight", (H,), torch.bfloat16)
        self.plain("head.weight", (VOCAB, H), torch.bfloat16)
        for block in ("", "mtp.0."):
            self.plain(f"{block}hc_head_fn", (HC, HC * H), torch.float32)
            self.plain(f"{block}hc_head_base", (HC,), torch.float32)
            self.plain(f"{block}hc_head_scale", (1,), torch.float32)

    def plain(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        number = torch.randn(shape, generator=self.g) * 0.05
        self.tensors[name] = self.values[name] = number.to(dtype)

    def bytes(self, *shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=self.g).to(torch.uint8)

    def fp8(self, name: str, rows: int, columns: int) -> None:
        code = self.bytes(rows, columns)
        code[code & 0x7F == 0x7F] = 0  # NaN
        sign = 1 - 2.0 * (code >> 7)
        exponent, mantissa = (code >> 3 & 15).float(), (code & 7).float()
        normal = (1 + mantissa / 8) * (exponent - 7).exp2()
        number = sign * torch.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
        tiles = (-(-rows // 128), -(-columns // 128))
        if self.is_base:
            scale = torch.rand(tiles, generator=self.g) / 2000
            spread, stored = scale, scale
        else:
            byte = self.bytes(*tiles, low=112, high=118)
            spread, stored = (byte.float() - 127).exp2(), byte.view(torch.float8_e8m0fnu)
        spread = spread.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        self.tensors[f"{name}.weight"] = code.view(torch.float8_e4m3fn)
        self.tensors[f"{name}.scale"] = stored
        self.values[f"{name}.weight"] = number * spread

    def fp4(self, name: str, rows: int, columns: int) -> None:
        if self.is_base:
            self.fp8(name, rows, columns)
            return
        codes = self.bytes(rows, columns // 2)
        byte = self.bytes(rows, columns // 32, low=119, high=123)
        table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
        value = torch.zeros(rows, columns)
        value[:, 0::2] = torch.tensor(table)[(codes % 16).int()]
        value[:, 1::2] = torch.tensor(table)[(codes // 16).int()]
        self.tensors[f"{name}.weight"] = codes.view(torch.int8)
        self.tensors[f"{name}.scale"] = byte.view(torch.float8_e8m0fnu)
        self.values[f"{name}.weight"] = value * (byte.float() - 127).exp2().repeat_interleave(32, 1)

    def compressor(self, name: str, ratio: int, size: int) -> None:
        width = 2 * size if ratio == 4 else size
        self.plain(f"{name}.ape", (ratio, width), torch.float32)
        self.plain(f"{name}.norm.weight", (size,), torch.bfloat16)
        self.plain(f"{name}.wkv.weight", (width, H), torch.bfloat16)
        self.plain(f"{name}.wgate.weight", (width, H), torch.bfloat16)

    def block(self, b: str, ratio: int, *, is_hash: bool) -> None:
        self.plain(f"{b}attn.attn_sink", (HEADS,), torch.float32)
        self.fp8(f"{b}attn.wq_a", Q_LORA, H)
        self.fp8(f"{b}attn.wq_b", HEADS * DIM, Q_LORA)
        self.fp8(f"{b}attn.wkv", DIM, H)
        self.fp8(f"{b}attn.wo_a", O_GROUPS * O_LORA, HEADS * DIM // O_GROUPS)
        self.fp8(f"{b}attn.wo_b", H, O_GROUPS * O_LORA)
        for name, size in (("attn.q_norm", Q_LORA), ("attn.kv_norm", DIM)):
            self.plain(f"{b}{name}.weight", (size,), torch.bfloat16)
        if ratio:
            self.compressor(f"{b}attn.compressor", ratio, DIM)
        if ratio == 4:
            self.compressor(f"{b}attn.indexer.compressor", ratio, INDEX_DIM)
            self.fp8(f"{b}attn.indexer.wq_b", INDEX_HEADS * INDEX_DIM, Q_LORA)
            self.plain(f"{b}attn.indexer.weights_proj.weight", (INDEX_HEADS, H), torch.bfloat16)
        self.plain(f"{b}ffn.gate.weight", (EXPERTS, H), torch.bfloat16)
        if is_hash:
            table = torch.randint(0, EXPERTS, (VOCAB, TOP), generator=self.g)
            self.tensors[f"{b}ffn.gate.tid2eid"] = self.values[f"{b}ffn.gate.tid2eid"] = table
        else:
            self.plain(f"{b}ffn.gate.bias", (EXPERTS,), torch.float32)
        for expert in range(EXPERTS):
            for matrix in ("w1", "w3"):
                self.fp4(f"{b}ffn.experts.{expert}.{matrix}", INTER, H)
            self.fp4(f"{b}ffn.experts.{expert}.w2", H, INTER)
        for matrix in ("w1", "w3"):
            self.fp8(f"{b}ffn.shared_experts.{matrix}", INTER, H)
        self.fp8(f"{b}ffn.shared_experts.w2", H, INTER)
        for name in ("attn_norm", "ffn_norm"):
            self.plain(f"{b}{name}.weight", (H,), torch.bfloat16)
        for name in ("attn", "ffn"):
            self.plain(f"{b}hc_{name}_fn", (2 * HC + HC * HC, HC * H), torch.float32)
            self.plain(f"{b}hc_{name}_base", (2 * HC + HC * HC,), torch.float32)
            self.plain(f"{b}hc_{name}_scale", (3,), torch.float32)

    def write(self, folder: Path, num_files: int = 3) -> Path:
        """Files with the tensors dealt out in turn, so that many a scale is in another one."""
        folder.mkdir(parents=True)
        names = sorted(self.tensors)
        weight_map: dict[str, str] = {}
        for i in range(num_files):
            file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
            save_file({n: self.tensors[n] for n in names[i::num_files]}, folder / file)
            weight_map |= dict.fromkeys(names[i::num_files], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = dict(CONFIG)
        if self.is_base:
            del config["expert_dtype"]
            config["quantization_config"] = {**CONFIG["quantization_config"]}
            del config["quantization_config"]["scale_fmt"]
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        return folder
