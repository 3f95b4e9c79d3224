"""Every document gets the logits and gradients it has alone; stock transformers is the oracle,
unpadded."""

from collections.abc import Sequence

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4Cache, V4ForCausalLM, tiles, visible
from posttrain.backbone.presets import CSA, HCA, SLIDING


def draw(lengths: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def alone(model: V4ForCausalLM, documents: Sequence[Tensor]) -> list[Tensor]:
    return [model(d[None]).logits[0] for d in documents]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor], atol: float = 2e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "layers", [[SLIDING], [CSA], [HCA], [SLIDING, CSA, HCA], [HCA, HCA, CSA, SLIDING]]
)
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 29, 40])
def test_unpadded_equals_stock(layers: list[str], length: int) -> None:
    model = small_model(layers)
    stock = DeepseekV4ForCausalLM(model.config)
    stock.load_state_dict(model.state_dict())
    ids = torch.stack(draw([length] * 3, seed=length))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=2e-5, rtol=0)


def test_gradients_equal_stocks() -> None:
    model = small_model()
    stock = DeepseekV4ForCausalLM(model.config)
    stock.load_state_dict(model.state_dict())
    ids = torch.stack(draw([30] * 2, seed=5))
    model(ids, labels=ids).loss.backward()
    stock(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert p.grad is not None, name
        if "indexer" in name:  # stock's never learns
            assert q.grad is None
            continue
        assert q.grad is not None, name
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-4, atol=1e-4 * float(q.grad.abs().max()) + 6e-8
        )


def pad(documents: Sequence[Tensor], lefts: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(documents), width), 2)
    mask = torch.zeros_like(ids)
    for row, (document, left) in enumerate(zip(documents, lefts, strict=True)):
        ids[row, left : left + len(document)] = document
        mask[row, left : left + len(document)] = 1
    return ids, mask


@pytest.mark.parametrize("lefts", [[27, 39, 11, 36, 0], [0, 0, 0, 0, 0], [3, 20, 7, 1, 0]])
def test_padding_on_either_side_changes_nothing(lefts: list[int]) -> None:
    model, documents = small_model(), draw([13, 1, 29, 4, 40], seed=1)
    ids, mask = pad(documents, lefts, 40)
    logits = model(ids, attention_mask=mask).logits
    found = [
        logits[row, left : left + len(d)]
        for row, (d, left) in enumerate(zip(documents, lefts, strict=True))
    ]
    assert_same(found, alone(model, documents))


def test_a_padded_batch_gives_the_gradients_of_its_documents() -> None:
    model, documents = small_model(), draw([13, 2, 29], seed=2)
    ids, mask = pad(documents, [27, 5, 3], 40)
    weight = [
        torch.randn(len(d), VOCAB, generator=torch.Generator().manual_seed(3)) for d in documents
    ]

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    for document, w in zip(documents, weight, strict=True):
        model.model.auxiliary_scale = len(document) / sum(map(len, documents))
        (model(document[None]).logits[0] * w).sum().backward()
    wanted = gradients()
    model.model.auxiliary_scale = 1.0
    logits = model(ids, attention_mask=mask).logits
    rows = zip(documents, weight, (27, 5, 3), strict=True)
    parts = [(logits[r, s : s + len(d)] * w).sum() for r, (d, w, s) in enumerate(rows)]
    torch.stack(parts).sum().backward()
    found = gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize("lengths", [[13, 1, 29, 4], [40, 3, 2, 37, 1, 1, 9, 5, 4]])
def test_packed_documents_are_alone(lengths: list[int]) -> None:
    model, documents = small_model(), draw(lengths, seed=4)
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    logits = model(packed, position_ids=positions).logits[0]
    assert_same(logits.split([len(d) for d in documents]), alone(model, documents))


def test_trailing_pads_at_position_zero_are_documents_of_one_token() -> None:
    model, documents = small_model(), draw([13, 6], seed=6)
    packed = torch.cat([*documents, torch.tensor([2, 2, 2])])[None]
    positions = torch.cat([torch.arange(13), torch.arange(6), torch.zeros(3, dtype=torch.long)])[
        None
    ]
    logits = model(packed, position_ids=positions).logits[0]
    assert_same(logits[:19].split([13, 6]), alone(model, documents))


def test_a_hole_in_the_mask_closes() -> None:
    model, (document,) = small_model(), draw([17], seed=7)
    ids = torch.cat([document[:5], torch.full((3,), 2), document[5:]])[None]
    mask = torch.cat([torch.ones(5), torch.zeros(3), torch.ones(12)])[None].long()
    logits = model(ids, attention_mask=mask).logits[0]
    assert_same([torch.cat([logits[:5], logits[8:]])], alone(model, [document]))


def test_rows_without_a_token_give_zeros() -> None:
    model = small_model()
    ids, mask = pad(draw([9], seed=8), [0], 9)
    hidden = model.model(
        torch.cat([ids, ids]), attention_mask=torch.cat([mask, 0 * mask])
    ).last_hidden_state
    assert torch.equal(hidden[1], torch.zeros_like(hidden[1]))
    assert hidden[0].abs().min() > 0


@pytest.mark.parametrize("layers", [[SLIDING, CSA, HCA], [CSA], [HCA, CSA]])
def test_prefill_and_decode_equal_the_full_forward_at_every_length(layers: list[str]) -> None:
    model, documents = small_model(layers), draw([45] * 5, seed=9)
    prefilled, slots = [1, 3, 16, 29, 8], [5, 0, 3, 1, 2]
    cache = V4Cache(model.config, 6, like=model.lm_head.weight)
    cache.reserve(45)
    hidden = model.model.prefill(
        [d[:n].tolist() for d, n in zip(documents, prefilled, strict=True)], cache, slots
    )
    wanted = [x.detach() for x in alone(model, documents)]
    assert_same(model.lm_head(hidden), [w[n - 1] for w, n in zip(wanted, prefilled, strict=True)])
    is_live = torch.ones(6, dtype=torch.long)
    is_live[4] = 0
    for step in range(16):
        tokens = torch.full((6,), 7)
        for document, n, slot in zip(documents, prefilled, slots, strict=True):
            tokens[slot] = document[n + step]
        logits = model.lm_head(model.model.decode(tokens, cache, is_live))
        assert_same(logits[slots], [w[n + step] for w, n in zip(wanted, prefilled, strict=True)])


@pytest.mark.parametrize("layers", [[SLIDING, CSA, HCA], [CSA], [HCA, CSA]])
@pytest.mark.parametrize("pieces", [[[5, 1, 7, 30, 2], [3, 3], [1] * 9], [[20, 25], [44, 1], [45]]])
def test_prefill_in_any_pieces_equals_the_full_forward(
    layers: list[str], pieces: list[list[int]]
) -> None:
    model, documents = small_model(layers), draw([45, 45, 45], seed=10)
    wanted = [x.detach() for x in alone(model, documents)]
    cache = V4Cache(model.config, 4, like=model.lm_head.weight)
    slots, start = [2, 0, 3], [0, 0, 0]
    for piece in range(max(map(len, pieces))):
        rows = [row for row in range(3) if piece < len(pieces[row])]
        parts = [documents[r][start[r] : start[r] + pieces[r][piece]].tolist() for r in rows]
        hidden = model.model.extend(parts, cache, [slots[r] for r in rows])
        for row, logits in zip(rows, model.lm_head(hidden), strict=True):
            start[row] += pieces[row][piece]
            assert_same([logits], [wanted[row][start[row] - 1]])
    assert cache.length_B[slots].tolist() == start


@pytest.mark.parametrize("chunk", [1, 6, 45, 100])
def test_a_prompt_in_chunks_is_one_prompt(chunk: int) -> None:
    model, documents = small_model(), draw([45, 7, 19], seed=11)
    cache = V4Cache(model.config, 3, like=model.lm_head.weight)
    cache.length_B += 5  # an earlier row's, to be forgotten
    hidden = model.model.prefill([d.tolist() for d in documents], cache, [1, 0, 2], chunk=chunk)
    assert_same(model.lm_head(hidden), [x.detach()[-1] for x in alone(model, documents)])
    assert cache.length_B.tolist() == [7, 45, 19]


@pytest.mark.parametrize("gather", [1, 100])
def test_long_rows_in_tiles_give_the_same_logits_and_gradients(
    monkeypatch: pytest.MonkeyPatch, gather: int
) -> None:
    model, documents = small_model([SLIDING, CSA, HCA, CSA]), draw([40, 33, 26], seed=12)
    ids, mask = pad(documents, [0, 7, 9], 40)
    weight = torch.randn(3, 40, VOCAB, generator=torch.Generator().manual_seed(13))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(ids, attention_mask=mask).logits
        (logits * mask.unsqueeze(-1) * weight).sum().backward()
        gradients = [(n, p.grad) for n, p in model.named_parameters()]
        return logits.detach(), {n: g.clone() for n, g in gradients if g is not None}

    logits, wanted = run()
    assert any("indexer" in name for name in wanted)
    monkeypatch.setattr(tiles, "TILE", 8)
    monkeypatch.setattr(tiles, "KEPT", 0)
    monkeypatch.setattr(visible, "GATHER", gather)
    in_tiles, found = run()
    torch.testing.assert_close(in_tiles, logits, atol=2e-5, rtol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7)


def test_hash_layers_need_token_ids() -> None:
    model = small_model()
    embeds = model.model.embed_tokens(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match="hash layers choose experts by token id"):
        model(inputs_embeds=embeds)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids, inputs_embeds=embeds).logits, model(ids).logits)
