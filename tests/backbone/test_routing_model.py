"""Routes and balance in the whole model: what a forward chose, another can be made to choose."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.balance import BalanceExperts, LoadMeter, balance_loss
from posttrain.backbone.routing import ExpertChoices, gates, scores
from posttrain.backbone.segments import Documents, find_documents

VOCAB, LAYERS = 61, 3


def make(seed: int = 0, **changes: Any) -> V4ForCausalLM:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "moe_intermediate_size": 16, "sliding_window": 7, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for gate in gates(model)[1:]:
        bias = torch.randn(8, generator=torch.Generator().manual_seed(seed))
        gate.e_score_correction_bias.copy_(0.05 * bias)
    return model


def padded(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids and mask with padding on both sides, and the documents."""
    source, width = torch.Generator().manual_seed(seed), max(lengths) + 4
    documents = [torch.randint(3, VOCAB, (n,), generator=source) for n in lengths]
    ids = torch.full((len(lengths), width), 2)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        first = (row * 3) % (width - len(document))
        ids[row, first : first + len(document)] = document
        mask[row, first : first + len(document)] = 1
    return ids, mask, documents


def documents_of(ids: Tensor, mask: Tensor) -> Documents:
    return find_documents((ids.shape[0], ids.shape[1]), ids.device, attention_mask=mask)


@torch.no_grad()
def test_captured_routes_are_the_documents_own() -> None:
    model = make().eval()
    ids, mask, documents = padded([13, 1, 29], seed=1)
    choices = model.model(ids, attention_mask=mask, capture_routes=True).routes
    batch = choices.to_batch(documents_of(ids, mask), tuple(ids.shape))
    assert batch.shape == (*ids.shape, LAYERS, 2)
    assert bool((batch[mask == 0] == -1).all())
    is_close = choices.is_close_T.split([len(d) for d in documents])
    for row, document in enumerate(documents):
        alone = model.model(document[None], capture_routes=True).routes
        is_sure = ~(alone.is_close_T | is_close[row])
        assert float(is_sure.float().mean()) > 0.9
        found = batch[row][mask[row] == 1].transpose(0, 1).long()
        assert torch.equal(found[:, is_sure], alone.expert_LTk[:, is_sure])
        assert torch.equal(found[0], gates(model)[0].tid2eid[document])
    assert model.model(ids, attention_mask=mask).routes is None


def test_replayed_routes_are_used_and_ones_own_change_nothing() -> None:
    model, learner = make(0).eval(), make(1).eval()
    ids, mask, _ = padded([13, 2, 29], seed=2)
    documents, shape = documents_of(ids, mask), (ids.shape[0], ids.shape[1])

    def run(who: V4ForCausalLM, replay: ExpertChoices | None = None) -> Any:
        return who.model(ids, attention_mask=mask, replay_routes=replay, capture_routes=True)

    first = run(model)
    again = run(model, first.routes)
    assert torch.equal(again.last_hidden_state, first.last_hidden_state)
    own = run(learner)
    through_batch = ExpertChoices.from_batch(first.routes.to_batch(documents, shape), documents)
    forced = run(learner, through_batch)
    assert torch.equal(forced.routes.expert_LTk, first.routes.expert_LTk)
    assert not torch.equal(forced.last_hidden_state, own.last_hidden_state)
    forced.last_hidden_state.square().sum().backward()
    for gate in gates(learner):
        assert float(gate.weight.grad.abs().max()) > 0


def test_checkpointing_replays_the_same_gradients() -> None:
    ids, mask, _ = padded([13, 2, 29], seed=3)
    grads: list[dict[str, Tensor]] = []
    for is_checkpointed in (False, True):
        model = make(1, balance_loss_weight=0.1).train()
        routes = make(0).model(ids, attention_mask=mask, capture_routes=True).routes
        if is_checkpointed:  # transformers 5.23's name for it, and 5.17's
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        model.model.load_meter = LoadMeter()
        out = model.model(ids, attention_mask=mask, replay_routes=routes).last_hidden_state
        out.square().mean().backward()
        load = model.model.load_meter.take()
        assert load is not None
        assert load.sum(dim=1).tolist() == [2 * int(mask.sum())] * LAYERS
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8, msg=name)


def test_the_balance_loss_trains_the_base_model_whatever_the_trainers_loss() -> None:
    ids, mask, _ = padded([13, 2, 29], seed=5)
    kept: dict[int, Tensor] = {}
    grads: dict[float, dict[str, Tensor]] = {}
    for weight in (0.0, 0.7):
        model = make(0, balance_loss_weight=weight, indexer_loss_weight=0.0).train()
        out = model.model(ids, attention_mask=mask).last_hidden_state
        (0.0 * out.sum()).backward()
        grads[weight] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not any(bool(g.any()) for g in grads[0.0].values())
    for layer in (1, 2):
        assert float(grads[0.7][f"model.layers.{layer}.mlp.gate.weight"].abs().max()) > 0

    # the last layer's gate, by hand: only its own loss reaches it
    model = make(0)
    norm: Any = model.model.layers[2].post_attention_layernorm
    norm.register_forward_hook(lambda _m, _a, y: kept.update({2: y.detach()}))  # pyright: ignore[reportUnknownLambdaType]
    model.model(ids, attention_mask=mask)
    gate, length_D = gates(model)[2], mask.sum(dim=1)
    document_T = torch.repeat_interleave(torch.arange(3), length_D)
    loss_D = balance_loss(scores(gate, kept[2]), document_T, length_D, k=2)
    (wanted,) = torch.autograd.grad(0.7 * (loss_D * length_D).sum() / mask.sum(), gate.weight)
    found = grads[0.7]["model.layers.2.mlp.gate.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_a_skewed_model_balances_under_the_callback() -> None:
    model = make(0, balance_loss_weight=0.0).train()
    gate = gates(model)[1]
    gate.e_score_correction_bias.copy_(torch.tensor([0.5, 0.5, *[0.0] * 6]))  # all to 0 and 1
    ids, mask, _ = padded([40, 33, 29], seed=6)
    callback, state = BalanceExperts(speed=0.02), object()
    callback.on_train_begin(state, state, state, model=model)
    busiest: list[float] = []
    for _ in range(60):
        model.model(ids, attention_mask=mask)
        load = model.model.load_meter._load_LE  # pyright: ignore[reportOptionalMemberAccess]
        assert load is not None
        busiest.append(float(load[1].max()) / (2 * int(mask.sum()) / 8))
        callback.on_optimizer_step(state, state, state, model=model)
    assert busiest[0] > 3.0
    assert busiest[-1] < 1.4


def test_a_meter_counts_nothing_outside_training() -> None:
    model = make(0)
    model.model.load_meter = LoadMeter()
    ids, mask, _ = padded([5, 3], seed=7)
    with torch.no_grad():  # a trainer's old log-probabilities
        model.model(ids, attention_mask=mask)
    model.eval().model(ids, attention_mask=mask)
    assert model.model.load_meter.take() is None


def test_transformers_trainer_moves_the_biases_once_a_step(tmp_path: Path) -> None:
    model = make(0)
    gate = gates(model)[1]
    gate.e_score_correction_bias.zero_()
    ids, _, _ = padded([12] * 8, seed=8)
    rows = [{"input_ids": row[:12], "labels": row[:12]} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    callbacks: list[Any] = [BalanceExperts(speed=0.25)]
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()  # pyright: ignore[reportArgumentType]
    bias = gate.e_score_correction_bias
    assert bool(bias.any())
    # three steps of -0.25, 0 or 0.25
    assert bool(((4 * bias).round() == 4 * bias).all())
    assert float(bias.abs().max()) <= 0.75
    assert model.model.load_meter is None
