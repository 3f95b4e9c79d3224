"""Where `use_kernels` says so, the backbone's own functions run in the kernels, with the results
they have without. Off a GPU the answer is forced, and triton's interpreter runs them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

pytest.importorskip("triton")

from posttrain.backbone import V4Cache, fp4
from posttrain.backbone.fp4_experts import PackedExperts, pack_experts, places_of
from posttrain.backbone.presets import CSA

BACKBONE, KERNELS = "posttrain.backbone", "posttrain.backbone.kernels"
USERS = ("attention", "decode_hyper", "fp4", "fp4_experts", "hyper_connections")
"""Modules that ask `use_kernels`."""

Calls = list[str]
Watch = Callable[..., Calls]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """watch(("mxfp4.fake_mxfp4",), "fp4"): these modules of the backbone use kernels from here on
    (before, none does, on a GPU neither); the calls of the kernels' entries named are taken down
    in the list it returns."""
    for name in USERS:
        monkeypatch.setattr(f"{BACKBONE}.{name}.use_kernels", lambda _: False)

    def count(entry: str, calls: Calls) -> None:
        name, _, attribute = entry.partition(".")
        module = import_module(f"{KERNELS}.{name}")
        original = getattr(module, attribute)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(entry)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, attribute, counted)

    def start(entries: tuple[str, ...], *modules: str) -> Calls:
        calls: Calls = []
        for entry in entries:
            count(entry, calls)
        for name in modules:
            monkeypatch.setattr(f"{BACKBONE}.{name}.use_kernels", lambda _: True)
        return calls

    return start


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def make(device: torch.device, **changes: Any) -> Any:
    model: Any = small_model(**changes)
    return model.to(device)


MXFP4 = ("mxfp4.quantize_mxfp4", "mxfp4.dequantize_mxfp4", "mxfp4.fake_mxfp4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_codecs_of_fp4(dtype: torch.dtype, device: torch.device, watch: Watch) -> None:
    x = torch.randn(3, 2, 64, generator=seeded(0))
    lowest = -140 if dtype == torch.float32 else -110  # the interpreter has no subnormal bf16
    x = (x * torch.randint(lowest, 100, (3, 2, 1), generator=seeded(1)).exp2()).to(device, dtype)
    x[0, 0, :40] = 0.0

    def all_three() -> list[Tensor]:
        codes, scale = fp4.quantize_mxfp4(x)
        back = fp4.dequantize_mxfp4(codes, scale, dtype=torch.float32)
        return [codes, scale, back, fp4.fake_mxfp4(x), fp4.fake_indexer_fp4(x)]

    wanted = all_three()
    calls = watch(MXFP4, "fp4")
    for a, b in zip(all_three(), wanted, strict=True):
        assert torch.equal(bits(a), bits(b))
    assert calls == [*MXFP4, MXFP4[2]]


def test_the_gradient_of_a_fake_quant_passes(device: torch.device, watch: Watch) -> None:
    calls = watch(MXFP4, "fp4")
    x = torch.randn(2, 40, generator=seeded(2)).to(device).requires_grad_()
    grad = torch.randn(2, 40, generator=seeded(3)).to(device)
    fp4.fake_mxfp4(x).backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)
    assert calls == ["mxfp4.fake_mxfp4"]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_packed_experts(num_tokens: int, device: torch.device, watch: Watch) -> None:
    model = make(device, moe_intermediate_size=32)
    pack_experts(model)
    experts: Any = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    x = torch.randn(num_tokens, 32, generator=seeded(4)).to(device)
    expert = torch.rand(num_tokens, 8, generator=seeded(5)).argsort(-1)[:, :2].to(device)
    weight = torch.rand(num_tokens, 2, generator=seeded(6)).to(device)

    def both() -> list[Tensor]:
        return [experts(x, expert, weight), experts.gate_up_proj, experts.down_proj]

    with torch.no_grad():
        wanted = both()
        calls = watch(MXFP4, "fp4", "fp4_experts")
        for a, b in zip(both(), wanted, strict=True):
            assert torch.equal(bits(a), bits(b))
    assert calls == ["mxfp4.dequantize_mxfp4"] * 4  # one call a matrix, whatever the experts


def test_places_among_the_experts_used() -> None:
    # 3 and 1 of five experts; two tokens of top-2 could name four
    name, place = places_of(torch.tensor([[3, 1], [1, 3]]), 5)
    assert name.tolist() == [1, 3, 0, 0]
    assert place.tolist() == [[1, 0], [0, 1]]
    every = torch.tensor([[2, 0], [1, 2]])
    name, place = places_of(every, 4)
    assert name.tolist() == [0, 1, 2, 3]
    assert torch.equal(place, every)


def run(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The logits, and every parameter's gradient by name."""
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids)
    output.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": output.logits.detach(), **{k: g for k, g in named.items() if g is not None}}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        apart = (value - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-6)
        assert float(apart) < tolerance, name


def draw_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=seeded(7))


def test_fake_quantisation_in_a_training_step(device: torch.device, watch: Watch) -> None:
    model = make(device, fake_quantization=["experts", "indexer"])
    ids = draw_ids(2, 21).to(device)
    wanted = run(model, ids)
    calls = watch(MXFP4, "fp4")
    found = run(model, ids)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name
    # three layers' two matrices, forward and backward, and the indexer's keys and queries
    assert calls == ["mxfp4.fake_mxfp4"] * 14


def test_attention_in_a_training_step(device: torch.device, watch: Watch) -> None:
    model, ids = make(device, layer_types=[CSA], index_topk=1), draw_ids(1, 11).to(device)
    wanted = run(model, ids)
    calls = watch(("attend.attend", "attend.top_entries"), "attention")
    compare(run(model, ids), wanted, 1e-4)
    assert calls == ["attend.attend", "attend.top_entries"]


HYPER = ("hyper.project", "hyper.sinkhorn", "hyper.sinkhorn_backward", "hyper.add_streams")


def test_hyper_connections_in_a_training_step(device: torch.device, watch: Watch) -> None:
    model, ids = make(device), draw_ids(1, 5).to(device)
    wanted = run(model, ids)
    calls = watch((*HYPER, "hyper.mix"), "hyper_connections")
    compare(run(model, ids), wanted, 1e-3)  # the head's scale is one number, a sum that cancels
    # three layers' two connections, and the head's, which has no Sinkhorn
    assert [calls.count(entry) for entry in (*HYPER, "hyper.mix")] == [7, 6, 6, 7, 6]


def test_hyper_connections_keep_float32_under_autocast(device: torch.device, watch: Watch) -> None:
    module: Any = make(device).model.layers[0].attn_hc
    x = torch.randn(5, 4, 32, generator=seeded(8)).to(device).bfloat16()
    wanted = module(x)
    calls = watch(HYPER[1:2], "hyper_connections")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = module(x)
    y = torch.randn(5, 32, generator=seeded(9)).to(device)
    pairs = ((found[0], wanted[0]), (found[1](y), wanted[1](y)))
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=0.05, rtol=1e-2)
    assert calls == ["hyper.sinkhorn"]


def test_every_kernel_in_one_training_step_with_checkpoints(
    device: torch.device, watch: Watch
) -> None:
    # layers run again in the backward; documents of 8 tokens, so two entries, and of one
    parts = ["experts", "indexer"]
    model = make(device, layer_types=[CSA], index_topk=1, fake_quantization=parts)
    ids = draw_ids(1, 9).to(device)
    position = torch.cat([torch.arange(n) for n in (8, 1)])[None].to(device)
    older = model.gradient_checkpointing_enable  # warns that it has a new name, where it has
    getattr(model, "activation_checkpointing_enable", older)()

    def step() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        output = model(ids, position_ids=position, labels=ids)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return {"logits": output.logits.detach(), **grads}

    wanted = step()
    entries = ("attend.attend", "attend.top_entries", *HYPER, "hyper.mix", MXFP4[2])
    calls = watch(entries, "attention", "fp4", "hyper_connections")
    found = step()
    compare(found, wanted, 1e-3)
    assert set(calls) == set(entries)


def test_hyper_connections_in_a_decode_step(device: torch.device, watch: Watch) -> None:
    model, ids = make(device).eval(), draw_ids(3, 9).to(device)

    def hidden() -> Tensor:
        cache = V4Cache(model.config, 3, like=model.lm_head.weight)
        model.model.prefill(ids[:, :8].tolist(), cache, [0, 1, 2])
        is_live = torch.ones(3, dtype=torch.long, device=device)
        watched.clear()
        return model.model.decode(ids[:, 8], cache, is_live)

    watched: Calls = []
    wanted = hidden()
    watched = watch((*HYPER[:2], "hyper.mix"), "hyper_connections", "decode_hyper")
    torch.testing.assert_close(hidden(), wanted, atol=2e-5, rtol=0)
    assert [watched.count(entry) for entry in (*HYPER[:2], "hyper.mix")] == [7, 6, 6]
