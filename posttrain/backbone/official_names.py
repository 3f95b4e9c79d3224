"""The official layout's tensors: their names, and what each holds of the model's.

A block is `layers.i.` or `mtp.j.`; its matrices in FP8 and FP4 have their scales beside them, under
the same name with `.scale` for `.weight`. A routed expert's three matrices are tensors of their
own there, and slices of two large ones in the model: w1 above w3 in gate_up_proj, w2 in down_proj.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.backbone.fp4 import GROUP, TILE
from posttrain.backbone.official_files import Entry, OfficialError

TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}

_COMPRESSOR = {
    "ape": "position_bias",
    "wkv.weight": "kv_proj.weight",
    "wgate.weight": "gate_proj.weight",
    "norm.weight": "kv_norm.weight",
}

BLOCK = {
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    **{f"attn.compressor.{a}": f"self_attn.compressor.{b}" for a, b in _COMPRESSOR.items()},
    **{
        f"attn.indexer.compressor.{a}": f"self_attn.compressor.indexer.{b}"
        for a, b in _COMPRESSOR.items()
    },
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    **{f"hc_{a}_{b}": f"{a}_hc.{b}" for a in ("attn", "ffn") for b in ("fn", "base", "scale")},
    "e_proj.weight": "e_proj.weight",  # these eight are the MTP block's own
    "h_proj.weight": "h_proj.weight",
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "norm.weight": "norm.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}

_MODEL_TOP = {model: official for official, model in TOP.items()}
_MODEL_BLOCK = {model: official for official, model in BLOCK.items()}
_MODEL_NAME = re.compile(r"(?:model\.)?((?:layers|mtp)\.\d+\.)(.+)")

FLOAT32 = re.compile(r"attn_sink$|\.ape$|hc_\w+_(fn|base|scale)$|gate\.bias$")
FP8 = re.compile(
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.|indexer\.wq_b\.|shared_experts\.w[123]\.|\.[eh]_proj\."
)
FP4 = re.compile(r"ffn\.experts\.\d+\.w[123]\.")
_FLOATS = ("BF16", "F32", "F16")


@dataclass(frozen=True, slots=True)
class Place:
    """An official tensor without its scale, and where the model keeps it:
    `Place("layers.0.ffn.experts.3.w1.weight", (64, 128), "model.layers.0.mlp.experts.gate_up_proj",
    (3, slice(0, 64)))`."""

    official: str
    shape: tuple[int, ...]
    model: str
    index: tuple[int | slice, ...] = ()

    @property
    def scale(self) -> str:
        """The name of its scale, where its dtype needs one."""
        return scale_name(self.official)

    @property
    def dtype(self) -> str:
        """How the released checkpoints store it."""
        if self.official.endswith(".tid2eid"):
            return "I64"
        if FLOAT32.search(self.official):
            return "F32"
        if FP4.search(self.official):
            return "I8"
        return "F8_E4M3" if FP8.search(self.official) else "BF16"


def scale_name(official: str) -> str:
    """`x.weight` to `x.scale`."""
    return official.removesuffix(".weight") + ".scale"


def places(shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """Every official tensor of a model whose state dict has these names and shapes.

    Raises:
        OfficialError: a name the official layout has no word for.
    """
    return [place for name, shape in shapes.items() for place in _places(name, shape)]


def _places(name: str, shape: tuple[int, ...]) -> Iterator[Place]:
    if name in _MODEL_TOP:
        yield Place(_MODEL_TOP[name], shape, name)
        return
    match = _MODEL_NAME.fullmatch(name)
    block, rest = match.groups() if match else ("", "")
    if rest == "mlp.experts.gate_up_proj":
        experts, rows, columns = shape
        for expert in range(experts):
            for matrix, first in (("w1", 0), ("w3", rows // 2)):
                official = f"{block}ffn.experts.{expert}.{matrix}.weight"
                index = (expert, slice(first, first + rows // 2))
                yield Place(official, (rows // 2, columns), name, index)
    elif rest == "mlp.experts.down_proj":
        for expert in range(shape[0]):
            official = f"{block}ffn.experts.{expert}.w2.weight"
            yield Place(official, shape[1:], name, (expert, slice(0, shape[1])))
    elif rest in _MODEL_BLOCK:
        yield Place(block + _MODEL_BLOCK[rest], shape, name)
    else:
        raise OfficialError(
            f"the official layout has no name for {name}: it holds V4ForCausalLM alone, so merge "
            "adapters and unwrap the model first"
        )


def stored(place: Place, dtype: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Names, permitted dtypes (the released one first) and shapes of what stores a place in
    `dtype`: itself, and its scale in FP8 and FP4."""
    if dtype == "F8_E4M3" and len(place.shape) == 2:
        tiles = tuple(math.ceil(length / TILE) for length in place.shape)
        return {
            place.official: (("F8_E4M3",), place.shape),
            place.scale: (("F8_E8M0", "F32"), tiles),
        }
    if dtype == "I8" and FP4.search(place.official):
        rows, columns = place.shape
        return {
            place.official: (("I8",), (rows, columns // 2)),
            place.scale: (("F8_E8M0",), (rows, columns // GROUP)),
        }
    own = place.dtype if place.dtype in _FLOATS else "BF16"
    others = tuple(kind for kind in _FLOATS if kind != own)
    kinds = ("I64", "I32") if place.dtype == "I64" else (own, *others)
    return {place.official: (kinds, place.shape)}


def find_problems(
    entries: Mapping[str, Entry], wanted: Iterable[Place], *, directory: Path
) -> list[str]:
    """What is missing, of another shape or dtype, or unknown, one sentence each.

    Args:
        entries: what the files hold.
        wanted: every tensor the model needs. `mtp.*` beyond them is known, and left alone.
    """
    problems: list[str] = []
    known: set[str] = set()
    for place in wanted:
        entry = entries.get(place.official)
        if entry is None:
            problems.append(
                f"tensor {place.official} is in no file of {directory}: expected "
                f"{place.dtype} for a matrix of {list(place.shape)}"
            )
            known |= {place.official, place.scale} if place.dtype in ("F8_E4M3", "I8") else set()
            continue
        for name, (dtypes, shape) in stored(place, entry.dtype).items():
            known.add(name)
            problems += _problem(entries.get(name), name, dtypes, shape, directory)
    for name in sorted(entries.keys() - known):
        if not name.startswith("mtp."):
            entry = entries[name]
            problems.append(
                f"{entry.file}: tensor {name} ({entry.words}) is none of this config.json's model"
            )
    return problems


def _problem(
    entry: Entry | None, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], where: Path
) -> list[str]:
    expected = f"{' or '.join(dtypes)} {list(shape)}"
    if entry is None:
        return [f"tensor {name} is in no file of {where}: expected {expected}"]
    if entry.dtype not in dtypes or entry.shape != shape:
        return [f"{entry.file}: tensor {name} is {entry.words}, expected {expected}"]
    return []
