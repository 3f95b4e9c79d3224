"""The laws of test_exactness.py over random configurations and batches: a document's logits and
gradients are its own, whatever stands beside it, and a cache gives what a full forward gives.

Batch and single runs take the same experts (replayed). Where two of the indexer's scores are less
than 1e-5 apart rounding may choose otherwise: such choices are counted, must be few, and are those
of the first run in the second (selections.py).
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from selections import CLOSE, Selections, watch
from small_v4 import VOCAB, small_model
from torch import Tensor
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4Cache, V4ForCausalLM
from posttrain.backbone.presets import CSA, HCA, SLIDING
from posttrain.backbone.routing import ExpertChoices, RouteTape

SEEDS = range(12)


@dataclass(frozen=True)
class Batch:
    """Rows of documents with padding anywhere between them."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    documents: list[Tensor]
    """In the order of the real tokens."""
    places: list[tuple[int, int]]
    """Each one's row and first column."""


def draw_model(draw: random.Random) -> V4ForCausalLM:
    layers = [draw.choice([SLIDING, CSA, HCA]) for _ in range(draw.randint(1, 4))]
    num_hash, heads = draw.randint(0, len(layers)), draw.choice([2, 4])
    return small_model(
        layers,
        seed=draw.randrange(1000),
        mlp_layer_types=["hash_moe"] * num_hash + ["moe"] * (len(layers) - num_hash),
        sliding_window=draw.randint(2, 12),
        index_topk=draw.randint(1, 6),
        compress_rates={CSA: draw.randint(2, 5), HCA: draw.randint(3, 9)},
        num_attention_heads=heads,
        o_groups=draw.choice([1, heads]),
        n_routed_experts=draw.randint(3, 8),
        num_experts_per_tok=draw.randint(1, 3),
        hc_mult=draw.randint(2, 4),
        hc_sinkhorn_iters=draw.randint(1, 6),
    )


def draw_batch(draw: random.Random) -> Batch:
    """1 to 7 rows; told apart by a mask (one document a row), by positions, or by both."""
    kind, rows = draw.choice(["mask", "positions", "both"]), draw.randint(1, 7)
    width = draw.randint(1, 45)
    generator = torch.Generator().manual_seed(draw.randrange(1000))
    ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    places: list[tuple[int, int, int]] = []
    for row in range(rows):
        column = draw.randint(0, width // 3) if kind != "positions" else 0
        while column < width:
            length = draw.randint(1, width - column)
            places.append((row, column, length))
            mask[row, column : column + length] = 1
            positions[row, column : column + length] = torch.arange(length)
            column += length + (draw.randint(0, 4) if kind == "both" else 0)
            if kind == "mask":
                break
    documents = [ids[row, first : first + length] for row, first, length in places]
    return Batch(
        ids.masked_fill(mask == 0, 2),
        None if kind == "positions" else mask,
        None if kind == "mask" else positions,
        documents,
        [(row, first) for row, first, _ in places],
    )


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Selections:
    return watch(monkeypatch)


def run(model: V4ForCausalLM, batch: Batch) -> tuple[list[Tensor], ExpertChoices]:
    """Each document's logits out of the batch, and the experts of its tokens."""
    output = model(
        batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        capture_routes=True,
    )
    pairs = zip(batch.documents, batch.places, strict=True)
    found = [output.logits[row, first : first + len(d)] for d, (row, first) in pairs]
    assert output.routes is not None
    return found, output.routes


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_are_alone_in_logits_and_gradients(seed: int, selections: Selections) -> None:
    draw = random.Random(seed)
    assert_alone(draw_model(draw), draw_batch(draw), seed, selections)


def test_documents_are_alone_at_v4s_own_window_and_rates(selections: Selections) -> None:
    """Below, at and above 128, in rows that begin anywhere."""
    lengths = (300, 127, 128, 129, 3, 5, 260)
    rates = {CSA: 4, HCA: 128}
    model = small_model(
        [SLIDING, CSA, HCA], sliding_window=128, index_topk=32, compress_rates=rates
    )
    draw, width = random.Random(7), 310
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    places = [(row, draw.randint(0, width - length)) for row, length in enumerate(lengths)]
    column = torch.arange(width)
    mask = torch.stack(
        [(column >= c) & (column < c + n) for (_, c), n in zip(places, lengths, strict=True)]
    ).long()
    documents = [ids[r, c : c + n] for (r, c), n in zip(places, lengths, strict=True)]
    batch = Batch(ids.masked_fill(mask == 0, 2), mask, None, documents, places)
    assert_alone(model, batch, 7, selections)


def assert_alone(model: V4ForCausalLM, batch: Batch, seed: int, selections: Selections) -> None:
    """Each document's logits, and the gradients of all, are what it has by itself."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(len(d), VOCAB, generator=generator) for d in batch.documents]

    def backward(logits: list[Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        parts = [(x * w).sum() for x, w in zip(logits, weights, strict=True)]
        torch.stack(parts).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found, routes = run(model, batch)
    total = sum(len(document) for document in batch.documents)
    gradients = backward(found)
    selections.replay()
    # a loss of the layers' own is a mean over a forward's tokens: each document's share of it
    model.zero_grad()
    wanted: list[Tensor] = []
    sizes = [len(document) for document in batch.documents]
    parts = zip(batch.documents, weights, routes.expert_LTk.split(sizes, dim=1), strict=True)
    for document, weight, part in parts:
        model.model.auxiliary_scale = len(document) / total
        wanted.append(model(document[None], replay_routes=ExpertChoices(part)).logits[0])
        (wanted[-1] * weight).sum().backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    singles = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert singles.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in singles.values())
    for name, gradient in singles.items():
        # the first layer's gates act on equal streams before a norm, a single expert's weight is
        # its share of itself: these gradients cancel
        cancels = "attn_hc." in name or name.endswith("mlp.gate.weight")
        atol = 1e-4 * float(gradient.abs().max()) + (1e-6 if cancels else 1e-9) * largest
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=atol, msg=name)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_a_cache_in_random_pieces_gives_what_a_forward_gives(
    seed: int, selections: Selections
) -> None:
    draw = random.Random(seed)
    model: Any = draw_model(draw).eval()
    rows = [
        torch.tensor([draw.randrange(3, VOCAB) for _ in range(draw.randint(2, 40))])
        for _ in range(draw.randint(1, 5))
    ]
    found = [model(row[None], capture_routes=True) for row in rows]
    full, routes = [x.logits[0] for x in found], [x.routes.expert_LTk for x in found]
    selections.replay()
    cache = V4Cache(model.config, len(rows), like=model.lm_head.weight)
    done = [0] * len(rows)

    def told(chosen: list[int], sizes: list[int]) -> RouteTape:
        """The experts that the rows' next tokens had in the full forward."""
        parts = [routes[i][:, done[i] : done[i] + n] for i, n in zip(chosen, sizes, strict=True)]
        return RouteTape(len(routes[0]), ExpertChoices(torch.cat(parts, dim=1)))

    while any(n < len(row) for n, row in zip(done, rows, strict=True)):
        live = [i for i, row in enumerate(rows) if done[i] < len(row)]
        if draw.random() < 0.5:  # a piece of some rows
            chosen = draw.sample(live, draw.randint(1, len(live)))
            sizes = [draw.randint(1, len(rows[i]) - done[i]) for i in chosen]
            pieces = [
                rows[i][done[i] : done[i] + n].tolist() for i, n in zip(chosen, sizes, strict=True)
            ]
            hidden = model.model.extend(pieces, cache, chosen, tape=told(chosen, sizes))
        else:  # one token of each row that has one left
            chosen, sizes = live, [1] * len(live)
            cache.reserve(max(done) + 1)
            token = torch.tensor(
                [int(row[min(n, len(row) - 1)]) for n, row in zip(done, rows, strict=True)]
            )
            is_live = torch.tensor([int(i in live) for i in range(len(rows))])
            tape = told(chosen, sizes)
            hidden = model.model.decode(token, cache, is_live, tape=tape)[torch.tensor(live)]
        for i, n, last in zip(chosen, sizes, hidden, strict=True):
            done[i] += n
            wanted = full[i][done[i] - 1]
            torch.testing.assert_close(model.lm_head(last), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_one_document_equals_stock_with_the_same_weights(seed: int) -> None:
    draw = random.Random(seed)
    model = draw_model(draw).eval()
    stock = DeepseekV4ForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    for _ in range(3):  # stock's routes cannot be told: of three drafts one leaves no doubt
        ids = torch.tensor([[draw.randrange(3, VOCAB) for _ in range(draw.randint(5, 40))]])
        output = model(ids, capture_routes=True)
        assert output.routes is not None
        assert output.routes.is_close_T is not None
        if not bool(output.routes.is_close_T.any()):
            break
    else:
        raise AssertionError("the router's scores are too close to compare")
    torch.testing.assert_close(output.logits, stock(ids).logits, atol=2e-5, rtol=0)


def test_few_choices_are_too_close_to_compare(selections: Selections) -> None:
    for seed in SEEDS:
        draw = random.Random(seed)
        model, batch = draw_model(draw), draw_batch(draw)
        with torch.no_grad():
            run(model, batch)
            selections.replay()
            run(model, batch)
        selections.is_replaying = False
    assert selections.num_choices > 300
    assert selections.num_close <= 3


@pytest.mark.parametrize("seed", SEEDS[:4])
def test_documents_are_alone_where_rounding_chooses(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    selections = watch(monkeypatch, noise=CLOSE / 4)
    rates = {CSA: 3, HCA: 5}
    model = small_model([CSA, HCA, CSA], seed=seed, index_topk=3, compress_rates=rates)
    for name, parameter in model.named_parameters():
        if "scorer.weights_proj" in name:
            parameter.data *= 1e-4  # leads of about as much as the noise
    draw = random.Random(seed)
    batch = draw_batch(draw)
    while max(map(len, batch.documents)) < 18:  # six entries, of which to choose three
        batch = draw_batch(draw)
    assert_alone(model, batch, seed, selections)
    assert selections.num_close > 5
    indexer = [p.grad for n, p in model.named_parameters() if ".indexer." in n]
    assert all(gradient is not None and gradient.any() for gradient in indexer)
