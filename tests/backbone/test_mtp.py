"""The multi-token-prediction block: the official maths, each document as if alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.attention import Context
from posttrain.backbone.mtp import (
    V4MTPBlock,
    add_mtp,
    ahead,
    mtp_config,
    mtp_loss,
    observe,
    weighted_cross_entropy,
)
from posttrain.backbone.routing import ExpertChoices

VOCAB, WINDOW = 61, 7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(seed: int = 0) -> tuple[V4ForCausalLM, V4MTPBlock]:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "moe_intermediate_size": 16, "sliding_window": WINDOW})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        block = add_mtp(model)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        gate: Any = block.mlp.gate
        gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model.eval(), block  # in training the indexers would learn beside


def draw(lengths: Sequence[int], seed: int) -> list[Tensor]:
    source = generator(seed)
    return [torch.randint(3, VOCAB, (n,), generator=source) for n in lengths]


def streams(model: V4ForCausalLM, ids: Tensor, **batch: Tensor) -> tuple[Tensor, Context]:
    seen = observe(model.model, ids, **batch)
    return seen.x_TNH, seen.context


def loss_of(
    model: V4ForCausalLM, block: V4MTPBlock, weight_BS: Tensor, ids: Tensor, **batch: Tensor
) -> Tensor:
    x_TNH, context = streams(model, ids, **batch)
    real = context.documents.token_T
    return mtp_loss(
        block,
        x_TNH,
        ids.flatten()[real],
        weight_BS.flatten()[real],
        context,
        **shared(model),
    )


def shared(model: V4ForCausalLM) -> dict[str, Any]:
    return {"embedding": model.model.embed_tokens, "head_VH": model.lm_head.weight}


def alone(model: V4ForCausalLM, block: V4MTPBlock, document: Tensor, weight: Tensor) -> Tensor:
    """The loss of one document, spelled out: slot t from token t + 1 to token t + 2."""
    x_TNH, context = streams(model, document[None])
    following = torch.cat([document[1:], document[:1]])
    hidden = block(x_TNH, model.model.embed_tokens(following), context)
    logits = model.lm_head(hidden)
    total = logits.sum() * 0.0
    for t in range(len(document) - 2):
        total = total + weight[t + 2] * F.cross_entropy(logits[t], document[t + 2])
    return total


@pytest.mark.parametrize("length", [1, 6, 8, 23])
def test_the_block_is_a_stock_layer_between_the_official_projections(length: int) -> None:
    model, block = make()
    whole = DeepseekV4ForCausalLM(mtp_config(model.config))
    own = {n: p for n, p in block.state_dict().items() if n in whole.model.layers[0].state_dict()}
    whole.model.layers[0].load_state_dict(own)
    assert len(block.state_dict()) - len(own) == 8
    (ids,) = draw([length], seed=length)
    x_TNH, context = streams(model, ids[None])
    embed = model.model.embed_tokens(ids.roll(-1))

    # official inference/model.py, MTPBlock.forward, then its head without the last product
    mixed = block.e_proj(block.enorm(embed))[None].unsqueeze(2) + block.h_proj(block.hnorm(x_TNH))
    place = torch.arange(length)
    distance = place[:, None] - place
    is_seen = (distance >= 0) & (distance < WINDOW)
    rope = whole.model.rotary_emb
    out = whole.model.layers[0](
        mixed,
        position_embeddings={
            name: rope(mixed, position_ids=place[None], layer_type=name)
            for name in ("main", "compress")
        },
        position_ids=place[None],
        attention_mask=torch.zeros(1, 1, length, length).masked_fill(~is_seen, float("-inf")),
    )
    wanted = block.norm(block.hc_head(out))[0]
    torch.testing.assert_close(block(x_TNH, embed, context), wanted, atol=2e-5, rtol=0)


def test_observing_gives_the_forward_itself() -> None:
    model, _ = make()
    (ids,) = draw([11], seed=1)
    seen = observe(model.model, ids[None])
    wanted = model.model(ids[None]).last_hidden_state
    assert torch.equal(seen.hidden_BSH, wanted)
    collapsed = model.model.hc_head(seen.x_TNH[None])
    assert torch.equal(model.model.norm(collapsed), wanted)


def test_routes_replayed_in_the_backbone_are_not_the_blocks() -> None:
    model, block = make()
    (ids,) = draw([11], seed=1)
    forced = ExpertChoices(torch.tensor([6, 7]).expand(3, 11, 2))
    seen = observe(model.model, ids[None], replay_routes=forced)
    embed = model.model.embed_tokens(ids.roll(-1))
    _, context = streams(model, ids[None])
    with_tape = block(seen.x_TNH, embed, seen.context)
    assert torch.equal(with_tape, block(seen.x_TNH, embed, context))


def test_ahead_by_hand() -> None:
    document_T = torch.tensor([0, 0, 0, 1, 2, 2])
    value, is_same = ahead(torch.arange(6), document_T, 1)
    assert value[is_same].tolist() == [1, 2, 5]
    assert is_same.tolist() == [True, True, False, False, True, False]
    value, is_same = ahead(torch.arange(6), document_T, 2)
    assert value[is_same].tolist() == [2]
    assert not bool(ahead(torch.arange(1), torch.zeros(1), 2)[1].any())


LENGTHS = [13, 1, 9, 2, 3]


def batch_of(kind: str, documents: list[Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    if kind == "packed":
        position = torch.cat([torch.arange(len(d)) for d in documents])
        return {
            "ids": torch.cat(documents)[None],
            "weight": torch.cat(weights)[None],
            "position_ids": position[None],
        }
    width = 16
    left = {"left": 1.0, "right": 0.0, "both": 0.5}[kind]
    ids, mask = torch.full((len(documents), width), 2), torch.zeros(len(documents), width)
    weight = torch.full((len(documents), width), 99.0)  # padding's weight is never read
    for row, (document, w) in enumerate(zip(documents, weights, strict=True)):
        first = int(left * (width - len(document)))
        ids[row, first : first + len(document)] = document
        mask[row, first : first + len(document)] = 1
        weight[row, first : first + len(document)] = w
    return {"ids": ids, "weight": weight, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["left", "right", "both", "packed"])
def test_a_batch_gives_the_loss_and_gradients_of_its_documents(kind: str) -> None:
    model, block = make()
    documents = draw(LENGTHS, seed=3)
    weights = [torch.rand(n, generator=generator(n)) for n in LENGTHS]
    weights[0][4:7] = 0.0
    total = sum(alone(model, block, d, w) for d, w in zip(documents, weights, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batch = batch_of(kind, documents, weights)
    loss = loss_of(model, block, batch.pop("weight"), batch.pop("ids"), **batch)
    torch.testing.assert_close(loss, total, atol=2e-5, rtol=1e-5)
    loss.backward()
    found = dict(model.named_parameters())
    for name, grad in wanted.items():
        own = found[name].grad
        assert own is not None, name
        scale = float(grad.abs().max())
        torch.testing.assert_close(own, grad, rtol=1e-4, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("lengths", [[1], [2, 1, 2]])
def test_documents_too_short_to_predict_give_zero_and_zero_gradients(lengths: list[int]) -> None:
    model, block = make()
    documents = draw(lengths, seed=1)
    batch = batch_of("packed", documents, [torch.ones(n) for n in lengths])
    loss = loss_of(model, block, batch.pop("weight"), batch.pop("ids"), **batch)
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert not bool(parameter.grad.any()), name


def test_detached_streams_leave_the_backbone_alone() -> None:
    model, block = make()
    (ids,) = draw([12], seed=1)
    x_TNH, context = streams(model, ids[None])
    mtp_loss(block, x_TNH.detach(), ids, torch.ones(12), context, **shared(model)).backward()
    layers = [p.grad for p in model.model.layers.parameters()]
    assert all(grad is None for grad in layers)
    for used in (model.model.embed_tokens.weight, model.lm_head.weight, block.e_proj.weight):
        assert used.grad is not None
        assert float(used.grad.abs().max()) > 0


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_the_cross_entropy_does_not_depend_on_its_tiles(rows_at_once: int) -> None:
    hidden = torch.randn(9, 5, generator=generator(1), dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 5, generator=generator(2), dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 11, (9,), generator=generator(3))
    weight = torch.rand(9, generator=generator(4), dtype=torch.float64)
    logp = (hidden @ head.T).log_softmax(dim=-1)
    wanted = -(weight * logp[torch.arange(9), target]).sum()
    found = weighted_cross_entropy(hidden, head, target, weight, rows_at_once)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, head)),
        torch.autograd.grad(wanted, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_it_learns_the_token_after_the_next() -> None:
    model, block = make()
    ids = torch.arange(24) * 5 % 7 + 3  # the cycle tells what comes
    with torch.no_grad():
        x_TNH, context = streams(model, ids[None])
    optimizer = torch.optim.Adam(block.parameters(), lr=0.03)
    losses: list[float] = []
    for _ in range(40):
        loss = mtp_loss(block, x_TNH, ids, torch.full((24,), 1 / 22), context, **shared(model))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 3.0
    assert losses[-1] < 0.5


def test_checkpointing_gives_the_same_gradients() -> None:
    model, block = make()
    (ids,) = draw([15], seed=2)
    with torch.no_grad():
        x_TNH, context = streams(model, ids[None])
    grads: list[list[Tensor]] = []
    for is_checkpointed in (False, True):
        if is_checkpointed:  # transformers 5.23's name for it, and 5.17's
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        assert getattr(block, "gradient_checkpointing", False) is is_checkpointed
        loss = mtp_loss(block.train(), x_TNH, ids, torch.ones(15), context, **shared(model))
        grads.append(list(torch.autograd.grad(loss, list(block.parameters()))))
    for found, wanted in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


def test_a_new_block_has_the_models_dtype_and_its_float32_parts() -> None:
    model, _ = make()
    whole: Any = model
    block = add_mtp(whole.to(torch.bfloat16))
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    assert dtypes["e_proj.weight"] == dtypes["mlp.experts.down_proj"] == torch.bfloat16
    for name in ("enorm.weight", "norm.weight", "hc_head.hc_fn", "attn_hc.fn", "self_attn.sinks"):
        assert dtypes[name] == torch.float32, name
    (ids,) = draw([9], seed=1)
    x_TNH, context = streams(model, ids[None])
    hidden = block(x_TNH, model.model.embed_tokens(ids), context)
    assert hidden.dtype == torch.bfloat16
    assert bool(hidden.isfinite().all())


def test_stock_and_ours_read_what_a_model_with_the_block_saves(tmp_path: Path) -> None:
    model, _ = make()
    model.save_pretrained(tmp_path)
    stock: Any = DeepseekV4ForCausalLM
    _, info = stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ours: Any = V4ForCausalLM
    back, info = ours.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    low = ours.from_pretrained(tmp_path, dtype=torch.bfloat16).mtp[0]
    assert low.enorm.weight.dtype == low.hc_head.hc_fn.dtype == torch.float32
    assert low.e_proj.weight.dtype == torch.bfloat16
