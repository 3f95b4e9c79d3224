"""The indexer learns which entries its layer attends to, whatever the trainer's own loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.backbone import V4ForCausalLM, indexer, preset_config, tiles
from posttrain.backbone.presets import CSA

TOP_K, LENGTH = 4, 96


def make_model(*, warmup: bool) -> V4ForCausalLM:
    config = preset_config("tiny", vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update(
        {
            "layer_types": [CSA],
            "mlp_layer_types": ["moe"],
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "moe_intermediate_size": 16,
            "sliding_window": 5,
            "index_topk": TOP_K,
            "indexer_warmup": warmup,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return V4ForCausalLM(config).train()


def train(model: V4ForCausalLM, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train the indexer alone; the recall in each step of the entries attended to most."""
    recalls: list[float] = []
    whole = indexer.loss

    def watched(score: Tensor, share: Tensor, mask: Tensor, has_query: Tensor) -> Tensor:
        late = slice(LENGTH // 2, None)  # queries with 12 entries or more to choose from
        seen = mask.expand(len(score), -1, -1)[:, late]
        hidden = torch.finfo(score.dtype).min
        found, wanted = (
            indexer.top_k_mask(x[:, late].detach().masked_fill(~seen, hidden), TOP_K)
            for x in (score, share.sum(2))
        )
        recalls.append(float((found & wanted).sum() / wanted.sum()))
        return whole(score, share, mask, has_query)

    monkeypatch.setattr(indexer, "loss", watched)
    monkeypatch.setattr(tiles, "TILE", LENGTH)  # all queries of a row in one call
    monkeypatch.setattr(tiles, "TILE_ROWS", LENGTH * 100)
    parameters = [p for n, p in model.named_parameters() if "indexer" in n]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        ids = torch.randint(3, 61, (4, LENGTH), generator=generator)
        hidden = model.model(ids).last_hidden_state
        (0.0 * hidden.sum()).backward()  # the trainer's own loss gives nothing here
        optimizer.step()
        model.zero_grad()
    monkeypatch.undo()
    return recalls


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_recall_of_what_is_attended_to_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(warmup=True)
    recalls = train(model, 80, monkeypatch)
    assert mean(recalls[:3]) < 0.5
    assert mean(recalls[-10:]) > mean(recalls[:3]) + 0.2


def test_the_loss_of_the_sparse_stage_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    whole = indexer.loss

    def watched(*parts: Any) -> Tensor:
        losses.append(float((found := whole(*parts)).detach()))
        return found

    monkeypatch.setattr(indexer, "loss", watched)
    monkeypatch.setattr(tiles, "TILE", LENGTH)  # all queries of a row in one call
    monkeypatch.setattr(tiles, "TILE_ROWS", LENGTH * 100)
    model = make_model(warmup=False)
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "indexer" in n], 1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(60):
        ids = torch.randint(3, 61, (4, LENGTH), generator=generator)
        (0.0 * model.model(ids).last_hidden_state.sum()).backward()
        optimizer.step()
        model.zero_grad()
    assert mean(losses[-10:]) < 0.7 * mean(losses[:5])


def test_it_gets_no_gradient_where_its_weight_is_zero_and_gives_none_to_the_rest() -> None:
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(3))
    for weight, is_learned in ((1.0, True), (0.0, False)):
        model = make_model(warmup=False)
        model.config.indexer_loss_weight = weight
        (0.0 * model.model(ids).last_hidden_state.sum()).backward()
        for name, parameter in model.named_parameters():
            size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
            assert (size > 0) == (is_learned and "indexer" in name), name
