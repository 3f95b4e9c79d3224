"""Training with serving's rounding: each part alone and all together, the same in every path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from posttrain.backbone import V4Cache, fp4
from posttrain.backbone.fake_quant import PARTS
from posttrain.backbone.fp4_experts import pack_experts
from posttrain.backbone.official_names import places


def make_model(*parts: str) -> Any:
    return small_model(hidden_size=64, moe_intermediate_size=64, fake_quantization=list(parts))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_the_logits_a_little(part: str) -> None:
    ids = draw(2, 40)
    with torch.no_grad():
        exact, rounded = make_model()(ids).logits, make_model(part)(ids).logits
    apart = float((exact - rounded).norm() / exact.norm())
    assert 1e-5 < apart < 0.5


def test_the_inputs_that_serving_rounds_are_those_of_official_fp8_matrices() -> None:
    model, inputs = make_model("activations"), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.update({f"{name}.weight": x[0]})
            )
    model(draw(2, 24))
    stored = places({name: p.shape for name, p in model.named_parameters()})
    in_fp8 = {place.model for place in stored if place.dtype == "F8_E4M3"}
    wanted = {name for name in in_fp8 if "o_a_proj" not in name}  # multiplied in bf16
    assert wanted <= inputs.keys()
    rounded = {n for n, x in inputs.items() if torch.equal(fp4.fake_fp8_activation(x), x)}
    assert rounded == wanted


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names \['weights'\]: the parts are experts, indexer"):
        make_model("weights")


@torch.no_grad()
@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS])
def test_decode_and_prefill_in_pieces_equal_the_full_forward(parts: tuple[str, ...]) -> None:
    model, ids = make_model(*parts).eval(), draw(9, 33)
    wanted = model(ids).logits
    cache = V4Cache(model.config, 9, like=model.lm_head.weight)
    rows, slots = ids.tolist(), list(range(9))
    found = [model.lm_head(model.model.extend([row[:21] for row in rows], cache, slots))]
    for step in range(21, 33):
        hidden = model.model.decode(ids[:, step], cache, torch.ones(9, dtype=torch.long))
        found.append(model.lm_head(hidden))
    # a last bit of x may be a whole step of FP8 or FP4, seldom, and later tokens read it
    apart = (torch.stack(found, 1) - wanted[:, 20:]).abs().amax(-1)
    assert float((apart < 1e-4).float().mean()) > 0.8
    assert float(apart.max()) < 0.5 * float(wanted.abs().max())


def test_masters_get_the_gradient_of_their_rounded_values() -> None:
    model, ids = make_model("experts"), draw(2, 24)
    model(ids, labels=ids).loss.backward()
    rounded = make_model()
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in rounded.model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.copy_(fp4.fake_mxfp4(weight))
    rounded(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_packed_experts_serve_what_was_trained_bit_for_bit() -> None:
    model, ids = make_model("experts", "activations").eval(), draw(2, 24)
    with torch.no_grad():
        trained = model(ids).logits
        pack_experts(model)
        assert torch.equal(model(ids).logits, trained)


def test_every_part_trains() -> None:
    model, ids = make_model(*PARTS).train(), draw(4, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_parts_are_saved_with_the_model(tmp_path: Path) -> None:
    make_model("kv", "experts").save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.config.fake_quantization) == {"kv", "experts"}
