"""A step in loops is the same step: torch's hidden states, cache and routes, for any configuration,
and the same bits in any number of threads."""

import random
from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from test_conformance import draw_model
from torch import Tensor

from posttrain.backbone import V4Cache, decode_step
from posttrain.backbone.chunks import Chunk, room_for, step
from posttrain.backbone.host import ROWS, threads
from posttrain.backbone.host.threads import even, spread
from posttrain.backbone.routing import ExpertChoices, RouteTape

LENGTH = 60


def draw(generator: torch.Generator, *shape: int, low: int = 3, high: int = VOCAB) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def run(model: Any, seed: int, num_slots: int = 19, *, in_loops: bool = True) -> list[Tensor]:
    """What random steps give, decoding rows and chunks, some rows real, some not; then all that
    the cache holds. The loops take part, or may not."""
    generator, columns = torch.Generator().manual_seed(seed), 5
    cache = V4Cache(model.config, num_slots, like=model.embed_tokens.weight, num_spare=columns - 1)
    cache.reserve(room_for(model.config, LENGTH))
    states: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        if not in_loops:
            patch.setattr(decode_step, "use_host_loops", lambda *_: False)
        for _ in range(14):
            slot_D = torch.randperm(num_slots, generator=generator)[:4]
            length_D = draw(generator, 4, low=0, high=columns + 1)
            is_live_B = draw(generator, num_slots, low=0, high=2)
            is_live_B[slot_D] = 0
            token_B, ids_DC = draw(generator, num_slots), draw(generator, 4, columns)
            reach = int(cache.length_B.max()) + columns
            hidden = step(
                model,
                cache,
                token_B=token_B,
                is_live_B=is_live_B,
                chunk=Chunk(ids_DC, length_D, slot_D),
                reach=reach,
            )
            real = (torch.arange(columns) < length_D[:, None]).flatten()
            states.append(hidden[torch.cat([is_live_B.bool(), real])].clone())
    return [*states, *(x.clone() for x in cache._tensors()), cache.length_B]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each step that went by loops."""
    from posttrain.backbone.host import step as host_step

    found: list[int] = []
    real = host_step.run_step

    def run_step(model: Any, weights: Any, token_id_T: Tensor, context: Any) -> Tensor:
        found.append(len(token_id_T))
        return real(model, weights, token_id_T, context)

    monkeypatch.setattr(host_step, "run_step", run_step)
    return found


def test_what_one_process_has_compiled_serves_any_configuration() -> None:
    from posttrain.backbone.host import attention, experts, rows, streams

    for seed in (0, 5):
        run(draw_model(random.Random(seed)).eval().model, seed)
    ids = torch.arange(3, 40)[None]
    for num_streams in (1, 4):
        model = small_model(hc_mult=num_streams)
        model(ids, labels=ids).loss.backward()
        run(model.eval().model, 0)
    loops = [x for m in (attention, experts, rows, streams) for x in vars(m).values()]
    types = {x.__name__: len(x.signatures) for x in loops if getattr(x, "signatures", None)}
    names = {"project", "compress", "choose", "attend", "mix", "read_blocks", "write"}
    assert types.keys() >= names
    assert set(types.values()) == {1}


@pytest.mark.parametrize("seed", range(8))
def test_steps_of_random_configurations_are_torchs(seed: int, counted: list[int]) -> None:
    model = draw_model(random.Random(seed)).eval().model
    found = run(model, seed)
    assert counted == [19 + 20] * 14
    wanted = run(model.double(), seed, in_loops=False)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=0)


def test_biases_choose_and_clamps_cut_as_in_torch() -> None:
    model: Any = small_model(n_routed_experts=6, swiglu_limit=0.05).eval().model
    for layer in model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.3, -0.3, 0.1, 0.2, -1]))
    found = run(model, 4)
    wanted = run(model.double(), 4, in_loops=False)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-5, rtol=0)


def test_of_experts_with_equal_scores_the_lowest_are_chosen() -> None:
    model: Any = small_model(n_routed_experts=6, num_experts_per_tok=2).eval().model
    for layer in model.layers[1:]:
        gate = layer.mlp.gate
        gate.weight.data[[1, 3, 4]] = gate.weight.data[3].clone()
        gate.e_score_correction_bias.copy_(torch.tensor([0.0, 9, 0, 9, 9, 0]))
    tape = RouteTape(len(model.layers))
    cache = V4Cache(model.config, 33, like=model.embed_tokens.weight)
    ids = draw(torch.Generator().manual_seed(1), 33)
    model.decode(ids, cache, torch.ones_like(ids), tape=tape)
    assert (tape.choices.expert_LTk[1:] == torch.tensor([1, 3])).all()


def test_a_token_that_is_no_number_is_its_own_slots_trouble() -> None:
    model: Any = small_model(n_routed_experts=6, index_topk=2).eval().model
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")

    def decode(token: int) -> Tensor:
        cache = V4Cache(model.config, 20, like=model.embed_tokens.weight)
        ids, live = torch.full((20,), 7), torch.ones(20, dtype=torch.long)
        for position in range(13):
            ids[3] = token if position == 3 else 7
            model.decode(ids, cache, live)
        return model.decode(ids, cache, live)

    spoilt, well, others = decode(5), decode(6), torch.arange(20) != 3
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[others], well[others])


def test_a_row_is_the_same_bits_in_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_model(n_routed_experts=4, index_topk=3).eval().model
    alone = run(model, 3)
    monkeypatch.setattr(threads, "WORTH", 1)
    before = torch.get_num_threads()
    try:
        for num in (2, 3, 7):
            torch.set_num_threads(num)
            for a, b in zip(run(model, 3), alone, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_parts_cover_all_rows_once_and_an_error_in_one_is_raised() -> None:
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows in (1, 2, 3, 10, 64):
            ends, seen = even(rows, threads.WORTH), list[int]()
            spread(lambda first, end, seen=seen: seen.extend(range(first, end)), ends)
            assert sorted(seen) == list(range(rows))
        assert even(64, 1) == [64]

        def fail(first: int, end: int) -> None:
            if first:
                raise ValueError(f"{first} to {end}")

        with pytest.raises(ValueError, match="4 to 8"):
            spread(fail, [4, 8])
    finally:
        torch.set_num_threads(torch_threads)


def test_routes_are_taken_down_and_given_back(counted: list[int]) -> None:
    model: Any = small_model(n_routed_experts=6).eval().model
    ids, live = draw(torch.Generator().manual_seed(0), 20), torch.ones(20, dtype=torch.long)
    live[3] = 0

    def decode(tape: RouteTape) -> Tensor:
        cache = V4Cache(model.config, 20, like=model.embed_tokens.weight)
        return model.decode(ids, cache, live, tape=tape)[live.bool()]

    tape = RouteTape(len(model.layers))
    hidden = decode(tape)
    expert_LTk = tape.choices.expert_LTk
    assert expert_LTk.shape == (len(model.layers), 19, 2)
    assert torch.equal(decode(RouteTape(len(model.layers), tape.choices)), hidden)
    other = ExpertChoices((expert_LTk + 1) % 6)
    replayed = RouteTape(len(model.layers), other)
    assert not torch.equal(decode(replayed), hidden)
    assert torch.equal(replayed.choices.expert_LTk, other.expert_LTk)
    assert counted == [20, 20, 20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step, "use_host_loops", lambda *_: False)
        in_torch = RouteTape(len(model.layers))
        torch.testing.assert_close(decode(in_torch), hidden, atol=2e-5, rtol=0)
        assert torch.equal(in_torch.choices.expert_LTk, expert_LTk)
        assert torch.equal(in_torch.close_T(), tape.close_T())


def step_of(model: Any) -> Tensor:
    cache = V4Cache(model.config, ROWS, like=model.embed_tokens.weight)
    return model.decode(torch.arange(ROWS) + 3, cache, torch.ones(ROWS, dtype=torch.long))


def test_weights_that_are_written_replaced_or_wrapped_are_seen_by_the_next_step(
    counted: list[int],
) -> None:
    model: Any = small_model().eval().model
    layer = model.layers[1]
    first = step_of(model)
    with torch.no_grad():
        layer.mlp.shared_experts.up_proj.weight.mul_(2)  # as an optimizer does
    second = step_of(model)
    assert not torch.equal(first, second)
    proj = layer.self_attn.o_b_proj
    proj.weight = torch.nn.Parameter(proj.weight.detach() * 2)
    third = step_of(model)
    assert not torch.equal(second, third)
    layer.self_attn.kv_proj.weight.data = layer.self_attn.kv_proj.weight.data * 2
    fourth = step_of(model)
    assert not torch.equal(third, fourth)
    assert len(counted) == 4
    handle = layer.self_attn.q_a_proj.register_forward_hook(lambda *args: args[-1] * 2)
    hooked = step_of(model)
    assert len(counted) == 4  # the loops know of no hook
    assert not torch.equal(fourth, hooked)
    handle.remove()
    assert torch.equal(step_of(model), fourth)
    layer.mlp.experts = Doubled(layer.mlp.experts)
    assert not torch.equal(step_of(model), fourth)
    assert len(counted) == 5


def test_an_expert_that_is_told_twice_counts_twice_and_one_that_is_not_there_is_named(
    counted: list[int],
) -> None:
    model: Any = small_model(n_routed_experts=6).eval().model
    ids, live = draw(torch.Generator().manual_seed(0), 20), torch.ones(20, dtype=torch.long)

    def replay(expert_LTk: Tensor) -> Tensor:
        cache = V4Cache(model.config, 20, like=model.embed_tokens.weight)
        tape = RouteTape(len(model.layers), ExpertChoices(expert_LTk))
        return model.decode(ids, cache, live, tape=tape)

    twice = torch.full((len(model.layers), 20, 2), 4)
    twice[:, ::2, 1] = -1  # the gate's own second, which may be the one that is told
    found = replay(twice)
    assert counted == [20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step, "use_host_loops", lambda *_: False)
        torch.testing.assert_close(found, replay(twice), atol=2e-5, rtol=0)
    twice[1, 3, 0] = 6
    with pytest.raises(IndexError, match="layer 1 is told to use expert 6, but has 6"):
        replay(twice)


@pytest.mark.parametrize("path", ["norm", "hc_head", "layers.1.mlp.gate", "layers.0.attn_hc"])
def test_a_module_that_is_wrapped_goes_by_torch(path: str, counted: list[int]) -> None:
    model: Any = small_model().eval().model
    step_of(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, Passing(model.get_submodule(path)))
    step_of(model)
    assert len(counted) == 1


class Passing(torch.nn.Module):
    """As PEFT's `modules_to_save`, whose weights are those of the adapter in use."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return self._modules["wrapped"] if name == "wrapped" else getattr(self.wrapped, name)

    def forward(self, *args: Any) -> Any:
        return self.wrapped(*args)


def test_a_forward_of_its_own_and_rounding_are_seen_by_the_next_step(counted: list[int]) -> None:
    model: Any = small_model().eval().model
    first, proj = step_of(model), model.layers[1].self_attn.o_b_proj
    proj.forward = lambda x: 2 * torch.nn.functional.linear(x, proj.weight)
    assert not torch.equal(step_of(model), first)
    del proj.forward
    assert torch.equal(step_of(model), first)
    assert len(counted) == 2
    model.config.fake_quantization = ["kv"]
    assert not torch.equal(step_of(model), first)
    assert len(counted) == 2


class Doubled(torch.nn.Module):
    """An adapter of the experts."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    @property
    def gate_up_proj(self) -> Tensor:
        return self.experts.gate_up_proj

    def forward(self, *args: Any) -> Tensor:
        return 2 * self.experts(*args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_by_torch(dtype: torch.dtype, counted: list[int]) -> None:
    model: Any = small_model().eval()
    assert step_of(model.to(dtype).model).dtype == dtype
    assert not counted


def test_servings_rounding_and_few_tokens_go_by_torch(counted: list[int]) -> None:
    step_of(small_model(fake_quantization=["kv"]).eval().model)
    model: Any = small_model().eval().model
    cache = V4Cache(model.config, 3, like=model.embed_tokens.weight)
    model.decode(torch.arange(3) + 3, cache, torch.ones(3, dtype=torch.long))
    assert not counted
