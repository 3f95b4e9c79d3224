"""Routing equals stock's in float32, breaks ties by index, and can be taken down and given back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.routing import (
    ExpertChoices,
    RouteTape,
    balanced_hash_table,
    freeze_routing,
    gates,
    margin,
    route,
    scores,
    top_k,
)
from posttrain.backbone.segments import find_documents

VOCAB = 61


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def make_gate(*, is_hash: bool, experts: int = 8, k: int = 2, size: int = 12, seed: int = 0) -> Any:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"n_routed_experts": experts, "num_experts_per_tok": k, "hidden_size": size})
    gate: Any = (stock.DeepseekV4HashRouter if is_hash else stock.DeepseekV4TopKRouter)(config)
    gate.weight.data = draw(experts, size, seed=seed)
    if is_hash:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gate.tid2eid.copy_(balanced_hash_table(VOCAB, k, experts))
    else:
        gate.e_score_correction_bias.copy_(0.3 * draw(experts, seed=seed + 1))
    return gate


def token_ids(count: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=generator(seed))


def spread(expert_Tk: Tensor, weight_Tk: Tensor, experts: int) -> Tensor:
    """Weights by expert (T, E): what does not depend on the order of a token's experts."""
    return weight_Tk.new_zeros(len(expert_Tk), experts).scatter_add(1, expert_Tk, weight_Tk)


@pytest.mark.parametrize("is_hash", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 6), (5, 5), (3, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_the_stock_router_chooses_and_weighs_the_same(
    is_hash: bool, experts: int, k: int, tokens: int
) -> None:
    gate = make_gate(is_hash=is_hash, experts=experts, k=k, seed=tokens)
    x, ids = draw(tokens, 12, seed=5), token_ids(tokens, 6)
    logits, weight, expert = gate(x, ids) if is_hash else gate(x)
    routes = route(gate, x, ids, is_hash=is_hash)
    assert routes.expert_Tk.dtype == torch.int64
    assert torch.equal(routes.score_TE, gate.score_fn(logits))
    assert torch.equal(routes.expert_Tk.sort(dim=-1).values, expert.sort(dim=-1).values)
    torch.testing.assert_close(
        spread(routes.expert_Tk, routes.weight_Tk, experts),
        spread(expert, weight, experts),
        rtol=1e-6,  # the k shares are added in another order
        atol=0,
    )


@pytest.mark.parametrize("is_hash", [False, True])
def test_the_stock_router_has_the_same_gradients(is_hash: bool) -> None:
    gate, ids = make_gate(is_hash=is_hash), token_ids(23, 1)
    x = draw(23, 12, seed=2).requires_grad_()
    factor = draw(23, 8, seed=3)

    def gradients(expert: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = (spread(expert, weight, 8) * factor).sum()
        return torch.autograd.grad(total, (x, gate.weight))

    routes = route(gate, x, ids, is_hash=is_hash)
    _, weight, expert = gate(x, ids) if is_hash else gate(x)
    wanted = gradients(expert, weight)
    torch.testing.assert_close(
        gradients(routes.expert_Tk, routes.weight_Tk), wanted, rtol=1e-5, atol=1e-6
    )


def test_by_hand() -> None:
    # s = sqrt(softplus(logit)); logits chosen so that s = (1, 2, 3): 3 wins, bias lifts 1 over 2
    gate = make_gate(is_hash=False, experts=3, k=2, size=1)
    gate.weight.data = torch.tensor([[1.0], [4.0], [9.0]]).expm1().log()
    gate.e_score_correction_bias.copy_(torch.tensor([1.5, 0.0, 0.0]))
    routes = route(gate, torch.ones(1, 1), torch.zeros(1, dtype=torch.long), is_hash=False)
    torch.testing.assert_close(routes.score_TE, torch.tensor([[1.0, 2.0, 3.0]]))
    assert routes.expert_Tk.tolist() == [[2, 0]]
    scaling = gate.routed_scaling_factor
    torch.testing.assert_close(routes.weight_Tk, scaling * torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_route_in_float32(dtype: torch.dtype) -> None:
    gate, x = make_gate(is_hash=False, experts=32, k=6), draw(50, 12, seed=8).to(dtype)
    wide = route(gate.to(dtype).float(), x.float(), token_ids(50, 1), is_hash=False)
    low = route(gate.to(dtype), x, token_ids(50, 1), is_hash=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = route(gate.float(), x, token_ids(50, 1), is_hash=False)
    for found in (low, autocast):
        assert found.weight_Tk.dtype == torch.float32
        assert torch.equal(found.score_TE, wide.score_TE)
    assert torch.equal(autocast.expert_Tk, wide.expert_Tk)


class WithWeight:
    """A gate whose weight is a plain tensor."""

    def __init__(self, gate: Any, weight: Tensor) -> None:
        self.gate, self.weight = gate, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)


def test_float64_stays_and_gradients_are_right() -> None:
    gate = make_gate(is_hash=False, experts=5, k=2, size=4).double()
    ids = token_ids(3, 0)

    def weights(x: Tensor, weight: Tensor) -> Tensor:
        return route(WithWeight(gate, weight), x, ids, is_hash=False).weight_Tk

    x = draw(3, 4, seed=1, dtype=torch.float64).requires_grad_()
    weight = gate.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(weights, (x, weight))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_ties_go_to_the_lowest_index(k: int) -> None:
    score = torch.randint(0, 4, (200, 16), generator=generator(k)).float()
    wanted = score.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_k(score, k), wanted)


def test_a_zero_gate_takes_the_first_experts_in_every_batch() -> None:
    gate = make_gate(is_hash=False)
    gate.weight.data.zero_()
    gate.e_score_correction_bias.zero_()
    for tokens in (1, 2, 33):
        expert = route(gate, draw(tokens, 12, seed=1), token_ids(tokens, 1), is_hash=False)
        assert expert.expert_Tk.tolist() == [[0, 1]] * tokens


@pytest.mark.parametrize("is_hash", [False, True])
def test_each_token_is_routed_for_itself(is_hash: bool) -> None:
    gate, x, ids = make_gate(is_hash=is_hash), draw(40, 12, seed=3), token_ids(40, 3)
    whole = route(gate, x, ids, is_hash=is_hash)
    for rows in torch.randperm(40, generator=generator(4)).split(9):
        part = route(gate, x[rows], ids[rows], is_hash=is_hash)
        assert torch.equal(part.expert_Tk, whole.expert_Tk[rows])
        torch.testing.assert_close(part.weight_Tk, whole.weight_Tk[rows], rtol=1e-5, atol=0)


def test_hopeless_logits_have_finite_gradients() -> None:
    gate = make_gate(is_hash=False, experts=4, k=2, size=1)
    gate.weight.data = torch.tensor([[-200.0], [-90.0], [1.0], [200.0]])
    x = torch.tensor([[1.0], [-1.0], [3.0]], requires_grad=True)
    routes = route(gate, x, token_ids(3, 1), is_hash=False)
    assert bool(routes.weight_Tk.isfinite().all())
    (routes.weight_Tk.square().sum() + routes.score_TE.sum()).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(gate.weight.grad.isfinite().all())


@pytest.mark.parametrize("is_hash", [False, True])
def test_replayed_experts_are_weighed_by_the_gate_of_today(is_hash: bool) -> None:
    gate, x, ids = make_gate(is_hash=is_hash), draw(30, 12, seed=9), token_ids(30, 9)
    chosen = torch.rand(30, 8, generator=generator(1)).argsort(dim=-1)[:, :2]
    routes = route(gate, x, ids, is_hash=is_hash, replay_Tk=chosen.to(torch.int16))
    assert torch.equal(routes.expert_Tk, chosen)
    score = torch.nn.functional.softplus(x.double() @ gate.weight.double().T).sqrt()
    taken = score.gather(1, chosen)
    wanted = gate.routed_scaling_factor * taken / taken.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(routes.weight_Tk.double(), wanted, rtol=1e-5, atol=1e-7)
    factor = draw(30, 2, seed=2)
    found = torch.autograd.grad((routes.weight_Tk * factor).sum(), gate.weight)[0]
    (reference,) = torch.autograd.grad((wanted * factor).sum(), gate.weight)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    assert float(found.abs().max()) > 0


@pytest.mark.parametrize("is_hash", [False, True])
def test_its_own_choice_replayed_changes_nothing_and_minus_one_is_not_replayed(
    is_hash: bool,
) -> None:
    gate, x, ids = make_gate(is_hash=is_hash), draw(30, 12, seed=9), token_ids(30, 9)
    own = route(gate, x, ids, is_hash=is_hash)
    again = route(gate, x, ids, is_hash=is_hash, replay_Tk=own.expert_Tk)
    assert torch.equal(again.weight_Tk, own.weight_Tk)
    other = (own.expert_Tk + 1) % 8
    other[::3] = -1
    mixed = route(gate, x, ids, is_hash=is_hash, replay_Tk=other)
    assert torch.equal(mixed.expert_Tk[::3], own.expert_Tk[::3])
    assert torch.equal(mixed.expert_Tk[1::3], other[1::3])


def test_routes_of_another_batch_are_refused() -> None:
    gate, x, ids = make_gate(is_hash=False), draw(4, 12, seed=1), token_ids(4, 1)
    with pytest.raises(ValueError, match=r"replay_Tk is \(3, 2\).*\(4, 2\)"):
        route(gate, x, ids, is_hash=False, replay_Tk=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="have 3 layers, the model 2"):
        RouteTape(2, ExpertChoices(torch.zeros(3, 4, 2, dtype=torch.long)))


def test_margins_by_hand() -> None:
    gate = make_gate(is_hash=False, experts=4, k=2)
    gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    # with the bias: (5, 4, 3, 3): 4 against 3;  (1, 2, 2, 9): 2 against 2, a tie
    score = torch.tensor([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 2.0, 8.0]])
    assert margin(gate, score, is_hash=False).tolist() == [1.0, 0.0]
    assert margin(gate, score, is_hash=True).tolist() == [float("inf")] * 2
    gate.top_k = 4
    assert margin(gate, score, is_hash=False).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 5)])
def test_choices_go_to_the_batch_and_back(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=generator(shape[1])) < 0.7
    mask[0, 0] = True
    documents = find_documents(shape, torch.device("cpu"), attention_mask=mask)
    tokens = int(mask.sum())
    chosen = torch.randint(0, 300, (5, tokens, 6), generator=generator(2))
    batch = ExpertChoices(chosen).to_batch(documents, shape)
    assert batch.dtype == torch.int16
    assert batch.shape == (*shape, 5, 6)
    assert bool((batch[~mask] == -1).all())
    back = ExpertChoices.from_batch(batch, documents)
    assert torch.equal(back.expert_LTk.long(), chosen)


def make_model(seed: int = 0) -> V4ForCausalLM:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.update({"hidden_size": 32, "moe_intermediate_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_frozen_gates_take_no_gradient_and_all_else_does() -> None:
    model, ids = make_model(), token_ids(24, 1)[None]
    assert len(gates(model)) == 3
    freeze_routing(model)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        is_gate = name.endswith("mlp.gate.weight")
        assert parameter.requires_grad is not is_gate, name
        assert parameter.grad is None or not is_gate, name
        assert parameter.grad is not None or "experts" not in name, name


class Layers(nn.Module):
    """Three routed layers without attention: x + weight * expert scale, each on the one before."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            [make_gate(is_hash=i == 0, seed=seed + 10 * i) for i in range(3)]
        )
        self.value = nn.Parameter(draw(8, 12, seed=seed + 77))

    def layer(self, i: int, x: Tensor, ids: Tensor, tape: RouteTape) -> Tensor:
        gate, is_hash = self.gates[i], i == 0
        routes = route(gate, x, ids, is_hash=is_hash, replay_Tk=tape.replay(i))
        tape.record(i, gate, routes, is_hash=is_hash)
        return x + spread(routes.expert_Tk, routes.weight_Tk, 8) @ self.value

    def forward(
        self, x: Tensor, ids: Tensor, tape: RouteTape, run: Callable[..., Any] | None = None
    ) -> Tensor:
        for i in range(3):
            x = run(self.layer, i, x, ids, tape) if run else self.layer(i, x, ids, tape)
        return x


def test_a_stale_samplers_experts_are_used_in_every_layer() -> None:
    sampler, learner = Layers(seed=0), Layers(seed=1)
    x, ids = draw(20, 12, seed=3), token_ids(20, 3)
    tape = RouteTape(3)
    sampler(x, ids, tape)
    assert tape.choices.expert_LTk.shape == (3, 20, 2)
    assert torch.equal(tape.choices.expert_LTk[0], gates(sampler)[0].tid2eid[ids])
    own, replayed = RouteTape(3), RouteTape(3, tape.choices)
    learner(x, ids, own)
    out = learner(x, ids, replayed)
    assert torch.equal(replayed.choices.expert_LTk, tape.choices.expert_LTk)
    assert not torch.equal(own.choices.expert_LTk, tape.choices.expert_LTk)
    out.square().sum().backward()
    for gate in gates(learner):
        assert float(gate.weight.grad.abs().max()) > 0


def test_a_tape_keeps_what_the_first_pass_took_down() -> None:
    layers, tape, ids = Layers(), RouteTape(3), token_ids(20, 4)
    layers(draw(20, 12, seed=4), ids, tape)
    layers(draw(20, 12, seed=5), ids, tape)  # as a checkpoint's second pass, were it another
    wanted = RouteTape(3)
    layers(draw(20, 12, seed=4), ids, wanted)
    assert torch.equal(tape.choices.expert_LTk, wanted.choices.expert_LTk)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_down_and_replays_the_same(reentrant: bool) -> None:
    model, x, ids = Layers(), draw(20, 12, seed=3).requires_grad_(), token_ids(20, 3)

    def run(layer: Any, *args: Any) -> Any:
        return checkpoint(layer, *args, use_reentrant=reentrant)

    def gradients(tape: RouteTape, how: Callable[..., Any] | None) -> list[Tensor]:
        out = model(x, ids, tape, how)
        before = tape.choices.expert_LTk
        model.zero_grad()
        out.square().sum().backward()
        assert torch.equal(tape.choices.expert_LTk, before)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    other = (RouteTape(3), RouteTape(3))
    wanted = gradients(other[0], None)
    for found, grad in zip(gradients(other[1], run), wanted, strict=True):
        assert torch.equal(found, grad)
    assert torch.equal(other[0].choices.expert_LTk, other[1].choices.expert_LTk)
    forced = ExpertChoices((other[0].choices.expert_LTk + 3) % 8)
    wanted = gradients(RouteTape(3, forced), None)
    for found, grad in zip(gradients(RouteTape(3, forced), run), wanted, strict=True):
        assert torch.equal(found, grad)


def test_close_tokens_are_those_that_a_nudge_routes_otherwise() -> None:
    model, ids = Layers(), token_ids(400, 3)
    tape = RouteTape(3)
    x = draw(400, 12, seed=3)
    model(x, ids, tape)
    is_close = tape.close_T(below=0.02)
    assert 0 < int(is_close.sum()) < 400
    assert int(tape.close_T().sum()) <= int(tape.close_T(1e-3).sum())
    gate: Any = model.gates[1]
    step = draw(400, 8, seed=5).clamp(-1, 1) * 0.0099  # two scores part or meet by < 0.02
    score = scores(gate, x)
    before, after = (top_k(s + gate.e_score_correction_bias, 2) for s in (score, score + step))
    moved = (before.sort().values != after.sort().values).any(dim=-1)
    assert bool(moved.any())
    assert bool((margin(gate, score, is_hash=False)[moved] < 0.02).all())
