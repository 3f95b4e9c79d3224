"""Sampling is seeded, unbiased, and blind to the rows beside it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.backbone.host import use_host_loops
from posttrain.rollout import sampling
from posttrain.rollout.sampling import Draw, sample, stream_key
from posttrain.rollout.sampling import uniform as uniforms


@pytest.fixture(autouse=True, params=["loops", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every law holds of both."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "use_host_loops", lambda _: False)
    elif not use_host_loops(torch.zeros(1)):
        pytest.skip("there are no loops here")
    return request.param


def uniform(key: int, position: int) -> float:
    return float(uniforms(np.array([key], np.uint64), np.array([position], np.uint64))[0])


def draw(
    logits: Tensor, u: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Draw:
    ones = torch.ones(len(logits), dtype=torch.float64)
    return sample(
        logits,
        u,
        temperature_B=ones * temperature if temperature != 1 else None,
        top_p_B=ones * top_p if top_p < 1 else None,
        top_k_B=(ones * top_k).long() if top_k else None,
    )


def test_uniform_numbers_are_uniform_and_differ_by_key_and_position() -> None:
    key = stream_key(0, "a", 0)
    numbers = torch.tensor([uniform(key, i) for i in range(20_000)])
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert (
        len(
            {
                uniform(stream_key(s, p, n), i)
                for s in (0, 1)
                for p in "ab"
                for n in (0, 1)
                for i in (0, 1)
            }
        )
        == 16
    )


def test_frequencies_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    u = torch.tensor(
        [uniform(stream_key(0, "x", 0), i) for i in range(40_000)], dtype=torch.float64
    )
    tokens, logp, *_ = draw(logits.expand(len(u), -1), u, temperature=0.7)
    wanted = (logits.double() / 0.7).softmax(-1)
    torch.testing.assert_close(
        torch.bincount(tokens, minlength=4) / len(u), wanted.float(), atol=0.01, rtol=0
    )
    torch.testing.assert_close(logp, wanted.log()[tokens])


def test_temperature_zero_is_greedy() -> None:
    tokens, logp, *_ = draw(
        torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.99], dtype=torch.float64), temperature=0.0
    )
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logp, torch.tensor([1.0, 3.0, 3.0]).double().log_softmax(-1)[1:2])


def test_top_k_and_top_p_keep_only_their_support() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(2000, -1)
    u = torch.arange(2000, dtype=torch.float64) / 2000
    assert set(draw(logits, u, top_k=2)[0].tolist()) == {0, 1}
    assert set(draw(logits, u, top_p=0.8)[0].tolist()) == {0, 1, 2}
    assert set(draw(logits, u, top_p=0.01)[0].tolist()) == {0}
    assert set(draw(logits, u, top_p=0.0)[0].tolist()) == {0}


def test_a_set_that_has_the_mass_already_takes_no_further_token_and_ties_go_to_the_lowest() -> None:
    u = torch.arange(400, dtype=torch.float64) / 400
    for size in (2, 4, 64):  # powers of two: their sums are exact
        logits = torch.zeros(size).expand(400, -1)
        half = set(range(size // 2))
        assert set(draw(logits, u, top_p=0.5)[0].tolist()) == half
        assert set(draw(logits, u, top_k=size // 2)[0].tolist()) == half


def test_a_token_without_probability_is_never_drawn() -> None:
    none = float("-inf")
    logits = torch.tensor([none, 0.0, none, 0.0, none]).expand(4, -1)
    u = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, u)[0].tolist() == [1, 1, 3, 3]


def test_a_row_does_not_see_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, u = (
        torch.randn(9, 50, generator=generator),
        torch.rand(9, generator=generator, dtype=torch.float64),
    )
    together = draw(logits, u)[0]
    assert together.tolist() == [int(draw(logits[i : i + 1], u[i : i + 1])[0]) for i in range(9)]


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    # the published first outputs of splitmix64 from state 1234567, shifted to 53 bits
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, i) for i in range(3)] == [(x >> 11) * 2.0**-53 for x in wanted]


def test_what_is_kept_is_a_distribution_and_its_logp_is_recorded() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(2000, -1)
    u = torch.arange(2000, dtype=torch.float64) / 2000
    drawn = draw(logits, u, top_p=0.8)
    assert drawn.keep_BV is not None
    assert drawn.keep_BV[0].tolist() == [True, True, True, False]
    # 0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9 of the kept mass
    wanted = torch.tensor([0.5, 0.25, 0.15]).double()[drawn.token_B]
    torch.testing.assert_close(drawn.kept_logp_B.exp(), wanted / 0.9)
    torch.testing.assert_close(drawn.logp_B.exp(), wanted)
    assert draw(logits, u).keep_BV is None


def test_a_row_that_nothing_is_cut_of_draws_the_same_beside_rows_that_are_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 500, generator=generator) * 6  # a tail that rounding sums to nothing
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    alone = draw(logits, u)
    is_cut = torch.arange(64) % 2 == 1
    mixed = sample(
        logits,
        u,
        temperature_B=torch.where(is_cut, 0.7, 1.0).double(),
        top_p_B=torch.where(is_cut, 0.5, 1.0).double(),
        top_k_B=torch.where(is_cut, 3, 0),
    )
    assert mixed.keep_BV is not None
    assert bool(mixed.keep_BV[~is_cut].all())
    assert int(mixed.keep_BV[is_cut].sum(-1).max()) <= 3
    for a, b in zip(alone[:3], mixed[:3], strict=True):
        assert torch.equal(a[~is_cut], b[~is_cut])


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 500, 4097])
def test_tokens_and_logprobs_are_those_of_float64(size: int) -> None:
    """Held against cumulative sums of numpy's; what is within rounding of a border may fall on
    either side of it."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(200, size, generator=generator) * 8
    logits[50:100] += 1e4
    logits[100:150] *= 1e3
    logits[:, size // 2 + 1 :: 3] = float("-inf")
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    heat = torch.rand(200, generator=generator, dtype=torch.float64) * 3 + 0.05
    drawn = sample(logits, u, temperature_B=heat)
    less = logits.double() - logits.double().max(dim=1, keepdim=True).values
    scaled = less.numpy() / heat.numpy()[:, None]
    logp = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    token = drawn.token_B.numpy()
    rows = np.arange(200)
    np.testing.assert_allclose(drawn.logp_B.numpy(), logp[rows, token], rtol=1e-12, atol=1e-12)
    after = np.exp(logp).cumsum(axis=1)
    before = np.where(token > 0, after[rows, token - 1], 0.0)
    assert (before <= u.numpy() + 1e-12).all()
    assert (u.numpy() < after[rows, token] + 1e-12).all()
    assert np.isfinite(logp[rows, token]).all()


@pytest.mark.parametrize("top_p", [1.0, 1 - 1e-12])
def test_a_row_draws_the_same_beside_rows_of_another_kind_where_its_cut_takes_nothing(
    top_p: float,
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(400, 50, generator=generator) * 3
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    is_own, others = torch.arange(400) % 2 == 1, torch.tensor([0.3, 1.0]).double().repeat(200)
    own = sample(logits, u, top_p_B=torch.full_like(u, top_p))
    mixed = sample(logits, u, top_p_B=others.sort().values.where(~is_own, top_p))
    assert own.keep_BV is not None
    assert bool(own.keep_BV.all())
    for a, b in zip(own[:3], mixed[:3], strict=True):
        assert torch.equal(a[is_own], b[is_own])


def test_any_number_of_threads_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(21, 300, generator=generator)
    u = torch.rand(21, generator=generator, dtype=torch.float64)
    one = draw(logits, u)
    monkeypatch.setattr("posttrain.backbone.host.threads.WORTH", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for a, b in zip(one[:3], draw(logits, u)[:3], strict=True):
        assert torch.equal(a, b)
