"""What a batch does to a document, stock beside ours: `python benchmarks/backbone_laws.py`.

Both have the same weights (tiny preset, fp32, CPU); documents of 90, 3 and 41 tokens. A number is
the largest difference between a document's logits in the batch and those it has alone in the same
model, over all its tokens; it takes seconds, and writes `docs/backbone-laws.md`.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import Json, machine, place, write
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM, preset_config

LENGTHS, VOCAB, WIDTH = (90, 3, 41), 512, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/backbone-laws.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]
    ours, stock = models()
    rows = [
        {"what": what, "stock": law(stock, documents), "ours": law(ours, documents)}
        for what, law in LAWS.items()
    ]
    data: Json = {**machine(), "rows": rows}
    write(arguments.page, data, page)


def models() -> tuple[Any, Any]:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    theirs = copy.deepcopy(config)  # a model writes into its config
    ours = V4ForCausalLM(config)
    for parameter in ours.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    stock = DeepseekV4ForCausalLM(theirs)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@torch.no_grad()
def alone(model: Any, documents: list[Tensor]) -> list[Tensor]:
    return [model(d[None], use_cache=False).logits[0] for d in documents]


def apart(found: list[Tensor], wanted: list[Tensor]) -> str:
    most = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return f"{most:.1e}"


def padded(documents: list[Tensor], lefts: list[int]) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(documents), WIDTH), 2)
    mask = torch.zeros_like(ids)
    for row, (document, left) in enumerate(zip(documents, lefts, strict=True)):
        ids[row, left : left + len(document)] = document
        mask[row, left : left + len(document)] = 1
    return ids, mask


def with_padding(side: str) -> Callable[[Any, list[Tensor]], str]:
    def law(model: Any, documents: list[Tensor]) -> str:
        room = [WIDTH - len(d) for d in documents]
        lefts = {"left": room, "right": [0] * 3, "both": [n // 2 for n in room]}[side]
        ids, mask = padded(documents, lefts)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        rows = enumerate(zip(documents, lefts, strict=True))
        found = [logits[row, left : left + len(d)] for row, (d, left) in rows]
        return apart(found, alone(model, documents))

    return law


def packed(model: Any, documents: list[Tensor]) -> str:
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        logits = model(torch.cat(documents)[None], position_ids=positions, use_cache=False).logits
    return apart(list(logits[0].split([len(d) for d in documents])), alone(model, documents))


def continued(model: Any, documents: list[Tensor]) -> str:
    """The last 20 tokens one by one on the cache of the rest, rows padded on the left."""
    long = [documents[0], documents[2]]
    ids, mask = padded(long, [WIDTH - len(d) for d in long])
    first, found = WIDTH - 20, []
    with torch.no_grad():
        output = model(ids[:, :first], attention_mask=mask[:, :first], use_cache=True)
        for column in range(first, WIDTH):
            output = model(
                ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            found.append(output.logits[:, -1])
    wanted = [x[-20:] for x in alone(model, long)]
    return apart(list(torch.stack(found, dim=1)), wanted)


def gradients(model: Any, documents: list[Tensor]) -> str:
    """Largest relative difference of a parameter's gradient, left padding against alone."""
    weight_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))

    def grads() -> dict[str, Tensor]:
        named = [(n, p.grad) for n, p in model.named_parameters() if "indexer" not in n]
        found = {n: g.clone() for n, g in named if g is not None}
        model.zero_grad()
        return found

    model.zero_grad()
    for document in documents:
        (model(document[None], use_cache=False).logits[0] @ weight_V).sum().backward()
    wanted = grads()
    ids, mask = padded(documents, [WIDTH - len(d) for d in documents])
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    ((logits @ weight_V) * mask).sum().backward()
    found = grads()
    most = max(float((found[n] - g).norm() / (g.norm() + 1e-6)) for n, g in wanted.items())
    return f"{most:.1e}"


def indexer_gradients(model: Any, documents: list[Tensor]) -> str:
    model.zero_grad()
    model.train()(documents[0][None], labels=documents[0][None], use_cache=False).loss.backward()
    named = [p.grad for n, p in model.named_parameters() if "indexer" in n]
    model.eval().zero_grad()
    return f"{sum(g is not None and bool(g.any()) for g in named)} of {len(named)}"


def hash_tables(model: Any, documents: list[Tensor]) -> str:
    """How often the table of a new model's hash layer names its busiest expert, a token."""
    table = type(model)(model.config).model.layers[0].mlp.gate.tid2eid
    return f"{float(table.flatten().bincount().max() / len(table)):.2f}"


def bf16_norms(model: Any, documents: list[Tensor]) -> str:
    """Norms, sinks and mHC in float32 after the auto classes' `from_config(dtype=bfloat16)`."""
    made = type(model)._from_config(model.config, dtype=torch.bfloat16)
    keys = ("norm", "sinks", "_hc.", "hc_head")
    kept = [
        p.dtype == torch.float32 for n, p in made.named_parameters() if any(k in n for k in keys)
    ]
    return f"{sum(kept)} of {len(kept)}"


LAWS: dict[str, Callable[[Any, list[Tensor]], str]] = {
    "padding on the left: logits apart": with_padding("left"),
    "padding on the right": with_padding("right"),
    "padding on both sides": with_padding("both"),
    "documents packed in one row, positions restart": packed,
    "20 tokens one by one on a cache, rows padded on the left": continued,
    "gradients with padding on the left, relative (worst parameter)": gradients,
    "indexer tensors with a gradient after a training step": indexer_gradients,
    "a new hash layer's busiest expert, choices a token (balanced: 0.25, top-2 at most 2)": (
        hash_tables
    ),
    "norms, sinks and mHC tensors in float32 in a model made in bfloat16": bf16_norms,
}


def page(data: Json) -> str:
    """The markdown page: where it was measured, and a table."""
    lines = [
        "# What a batch does to a document",
        "",
        f"{place(data)}, tiny preset, fp32, the same weights in both. "
        "Written by `benchmarks/backbone_laws.py`, which says how.",
        "",
        "| | stock | ours |",
        "|---|---|---|",
    ]
    lines += [f"| {row['what']} | {row['stock']} | {row['ours']} |" for row in data["rows"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
