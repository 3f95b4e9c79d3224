"""The balance loss per document, and biases that follow the load of the global batch."""

from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import preset_config
from posttrain.backbone.balance import (
    BalanceExperts,
    LoadMeter,
    attach_balance,
    balance_loss,
    expert_load,
    update_bias,
    update_biases,
)
from posttrain.backbone.routing import ExpertChoices, freeze_routing, route
from posttrain.backbone.segments import find_documents


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_gate(kind: Any = stock.DeepseekV4TopKRouter, *, experts: int = 8, size: int = 12) -> Any:
    config = preset_config("tiny", vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"n_routed_experts": experts, "hidden_size": size})
    gate: Any = kind(config)
    gate.weight.data = draw(experts, size, seed=3)
    return gate


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    length_D = torch.tensor(lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), length_D), length_D


def reference(score: Tensor, k: int) -> Tensor:
    """V3 eqs. 17-20 of one document, in float64, term by term."""
    tokens, experts = score.shape
    total = torch.zeros((), dtype=torch.float64)
    best = score.double().argsort(dim=-1, descending=True, stable=True)[:, :k].tolist()
    for i in range(experts):
        f = experts / (k * tokens) * sum(i in row for row in best)
        share = sum(score[t, i].double() / score[t].double().sum() for t in range(tokens))
        total = total + f * share / tokens
    return total


def test_by_hand() -> None:
    # E = 3, k = 1, two tokens: shares (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2)
    # f = 3/2 (1, 0, 1), P = (3/8, 1/4, 3/8): 3/2 * 3/4 = 9/8;  the second alone: 3 * 1/2
    score = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 1.0, 2.0]])
    document_T, length_D = packed([2, 1])
    loss = balance_loss(score, document_T, length_D, k=1)
    torch.testing.assert_close(loss, torch.tensor([1.125, 1.5]))


def test_one_where_balanced_and_experts_over_k_where_all_agree() -> None:
    document_T, length_D = packed([8])
    even = torch.full((8, 8), 1e-4) + torch.eye(8)
    torch.testing.assert_close(balance_loss(even, document_T, length_D, k=1), torch.ones(1))
    same = torch.tensor([1.0, 1.0, *[1e-9] * 6]).expand(8, 8)
    torch.testing.assert_close(balance_loss(same, document_T, length_D, k=2), torch.tensor([4.0]))


@pytest.mark.parametrize("k", [1, 2, 6])
def test_equals_the_report_in_float64(k: int) -> None:
    lengths = [1, 7, 3, 19]
    document_T, length_D = packed(lengths)
    score = torch.nn.functional.softplus(draw(30, 9, seed=k, dtype=torch.float64)).sqrt()
    score.requires_grad_()
    loss = balance_loss(score, document_T, length_D, k=k)
    wanted = torch.stack([reference(part, k) for part in score.split(lengths)])
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    weight = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    (found,) = torch.autograd.grad(loss @ weight, score)
    (grad,) = torch.autograd.grad(wanted @ weight, score)
    torch.testing.assert_close(found, grad, rtol=1e-10, atol=1e-14)
    narrow = balance_loss(score.detach().float(), document_T, length_D, k=k)
    torch.testing.assert_close(narrow.double(), wanted.detach(), rtol=1e-5, atol=0)


def test_gradcheck() -> None:
    document_T, length_D = packed([2, 3])
    score = draw(5, 4, seed=1, dtype=torch.float64).abs().add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: balance_loss(s, document_T, length_D, k=2),  # pyright: ignore[reportUnknownLambdaType]
        (score,),
    )


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_documents_count_for_themselves_however_the_batch_is_cut(cut: int) -> None:
    lengths = [4, 1, 11, 6]
    document_T, length_D = packed(lengths)
    score = draw(22, 8, seed=2).abs()
    whole = balance_loss(score, document_T, length_D, k=2)
    tokens = sum(lengths[:cut])
    first = balance_loss(score[:tokens], *packed(lengths[:cut]), k=2)
    rest = balance_loss(score[tokens:], *packed(lengths[cut:]), k=2)
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-6, atol=0)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(3))
    shuffled = balance_loss(score[order], document_T[order], length_D, k=2)
    torch.testing.assert_close(shuffled, whole, rtol=1e-5, atol=0)


def test_its_gradient_evens_the_scores_of_crowded_experts() -> None:
    document_T, length_D = packed([16])
    score = torch.rand(16, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    score[:, 0] += 1.0  # everyone's first choice
    score.requires_grad_()
    balance_loss(score, document_T, length_D, k=1).sum().backward()
    assert score.grad is not None
    assert bool((score.grad[:, 0] > 0).all())
    assert bool((score.grad[:, 1:] < 0).all())


def test_load_by_hand() -> None:
    chosen = torch.tensor([[[0, 2], [2, 1], [-1, -1]], [[3, 3], [0, 1], [1, 0]]], dtype=torch.int16)
    load = expert_load(ExpertChoices(chosen), 4)
    assert load.tolist() == [[1, 1, 2, 0], [2, 2, 0, 2]]


def test_bias_by_hand() -> None:
    gate = make_gate(experts=4)
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
    update_bias(gate, torch.tensor([4, 4, 0, 8]), speed=0.01)  # the mean is 4
    torch.testing.assert_close(
        gate.e_score_correction_bias, torch.tensor([0.0, 0.1, 0.21, 0.29]), rtol=0, atol=1e-7
    )
    update_bias(gate, torch.zeros(4, dtype=torch.long), speed=0.01)  # no tokens: no move
    torch.testing.assert_close(
        gate.e_score_correction_bias, torch.tensor([0.0, 0.1, 0.21, 0.29]), rtol=0, atol=1e-7
    )


def test_hash_layers_and_frozen_gates_stay() -> None:
    layers = nn.ModuleList([make_gate(stock.DeepseekV4HashRouter), make_gate(), make_gate()])
    freeze_routing(layers[2])
    before = [b.clone() for b in layers.buffers()]
    update_biases(layers, torch.arange(24).view(3, 8), speed=0.5)
    after = list(layers.buffers())
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        update_biases(layers, torch.zeros(2, 8), speed=0.5)


def test_a_skewed_router_balances() -> None:
    gate = make_gate()
    x = draw(512, 12, seed=1) + gate.weight.data[:2].sum(0)  # tokens lean to experts 0 and 1
    ids = torch.zeros(512, dtype=torch.long)

    def busiest() -> float:
        chosen = route(gate, x, ids, is_hash=False).expert_Tk
        return float(torch.bincount(chosen.flatten(), minlength=8).max()) / (512 * 2 / 8)

    assert busiest() > 2.0
    for _ in range(300):
        choices = ExpertChoices(route(gate, x, ids, is_hash=False).expert_Tk[None])
        update_bias(gate, expert_load(choices, 8)[0], speed=0.01)
    assert busiest() < 1.1


def test_the_balance_loss_alone_balances_a_gate() -> None:
    gate, (document_T, length_D) = make_gate(), packed([128] * 4)
    x = draw(512, 12, seed=1) + gate.weight.data[:2].sum(0)
    optimizer = torch.optim.Adam([gate.weight], lr=0.03)
    ids = torch.zeros(512, dtype=torch.long)
    losses: list[float] = []
    for _ in range(60):
        score = route(gate, x, ids, is_hash=False).score_TE
        loss = balance_loss(score, document_T, length_D, k=2).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.2
    assert losses[-1] < 1.02


class Routed(nn.Module):
    """A base model of two routed layers, with a meter for their load."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([make_gate(stock.DeepseekV4HashRouter), make_gate()])
        self.load_meter: LoadMeter | None = None

    def forward(self, x: Tensor, ids: Tensor) -> None:
        chosen = [
            route(gate, x, ids, is_hash=i == 0).expert_Tk for i, gate in enumerate(self.gates)
        ]
        if self.load_meter is not None:
            self.load_meter.add(ExpertChoices(torch.stack(chosen)), 8)


@pytest.mark.parametrize("cuts", [1, 3])
def test_the_callback_moves_biases_once_a_step_by_all_micro_batches(cuts: int) -> None:
    base, x = Routed(), draw(30, 12, seed=4)
    wrapped, ids = nn.Sequential(base), torch.zeros(30, dtype=torch.long)
    callback, nothing = BalanceExperts(speed=0.25), SimpleNamespace()
    callback.on_train_begin(nothing, nothing, nothing, model=wrapped)
    for rows in torch.arange(30).chunk(cuts):
        base(x[rows], ids[rows])
    bias: Any = base.gates[1].e_score_correction_bias
    assert not bool(bias.any())
    callback.on_optimizer_step(nothing, nothing, nothing, model=wrapped)
    chosen = route(base.gates[1], x, ids, is_hash=False)
    fresh = make_gate()
    load = torch.bincount(route(fresh, x, ids, is_hash=False).expert_Tk.flatten(), minlength=8)
    assert torch.equal(bias, 0.25 * torch.sign(60 - 8 * load).float())
    assert chosen.expert_Tk.shape == (30, 2)
    callback.on_optimizer_step(nothing, nothing, nothing, model=wrapped)  # nothing was counted
    assert torch.equal(bias, 0.25 * torch.sign(60 - 8 * load).float())
    callback.on_train_end(nothing, nothing, nothing, model=wrapped)
    assert base.load_meter is None


def test_ranks_that_add_their_loads_move_as_one() -> None:
    x, ids = draw(60, 12, seed=5), torch.zeros(60, dtype=torch.long)
    whole, ranks = make_gate(), [make_gate(), make_gate()]

    def load(rows: Tensor) -> Tensor:
        return expert_load(ExpertChoices(route(whole, rows, ids, is_hash=False).expert_Tk[None]), 8)

    ids_of = [load(x[:25]), load(x[25:])]
    for gate in ranks:
        update_bias(gate, (ids_of[0] + ids_of[1])[0], speed=0.1)
    update_bias(whole, load(x)[0], speed=0.1)
    for gate in ranks:
        assert torch.equal(gate.e_score_correction_bias, whole.e_score_correction_bias)


def summed(rank: int, meeting: str, found: Any) -> None:
    """One of two ranks: what its meter gives of tokens that only it has seen."""
    meter = LoadMeter()
    for experts in ([[0, 2]], [[0, 1]])[rank:]:
        meter.add(ExpertChoices(torch.tensor([experts])), 3)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        load = meter.take()
        found.put((rank, load is not None and load.tolist(), meter.take()))
    finally:
        dist.destroy_process_group()


def test_a_meter_sums_over_the_ranks_of_a_group(tmp_path: Path) -> None:
    """The first has seen four choices, the second two of them again."""
    context = get_context("spawn")
    found: Any = context.Queue()
    ranks = [
        context.Process(target=summed, args=(rank, str(tmp_path / "s"), found)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    told = sorted(found.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert told == [(0, [[3, 2, 1]], None), (1, [[3, 2, 1]], None)]


def test_an_attached_loss_weighs_documents_by_their_tokens() -> None:
    lengths, gate = [5, 1, 10], make_gate()
    x, ids = draw(16, 12, seed=6), torch.zeros(16, dtype=torch.long)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = find_documents((1, 16), torch.device("cpu"), position_ids=position)
    score = route(gate, x, ids, is_hash=False).score_TE
    loss_D = balance_loss(score, *packed(lengths), k=2)
    wanted = 0.3 * (loss_D * torch.tensor(lengths)).sum() / 16
    (reference,) = torch.autograd.grad(wanted, gate.weight)
    score = route(gate, x, ids, is_hash=False).score_TE
    out = attach_balance(x, score, documents, k=2, scale=0.3)
    assert torch.equal(out, x)
    out.square().sum().backward()
    torch.testing.assert_close(gate.weight.grad, reference, rtol=1e-5, atol=1e-8)


def test_a_forward_without_gradients_is_not_counted() -> None:
    meter, choices = LoadMeter(), ExpertChoices(torch.tensor([[[0], [2], [2]], [[1], [1], [1]]]))
    with torch.no_grad():
        meter.add(choices, 3)
    assert meter.take() is None
    meter.add(choices, 3)
    load_LE = meter.take()
    assert load_LE is not None
    assert load_LE.tolist() == [[1, 0, 2], [0, 3, 0]]
    assert meter.take() is None
