"""The loops' parts give what float64 gives; a row's bits do not depend on the rows beside it."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.backbone.decode_keys import best as best_in_torch
from posttrain.backbone.host import attention, experts, rows, sinkhorn, streams, sums
from posttrain.backbone.host.attention import best
from posttrain.backbone.host.loops import loop
from posttrain.backbone.host.sinkhorn import BLOCK


@loop
def exps(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = sums.exp(x[i])


@loop
def multiply(x: Any, weight: Any, out: Any, first: int, to: int) -> None:
    sums.product(x, weight, out, first, to)


@loop
def accumulate(weight: Any, x: Any, out: Any, first: int) -> None:
    sums.add_weighted(weight, x, out, first)


sweeps = sinkhorn.sinkhorn


@loop
def balance(comb: Any, iterations: int, eps: float) -> None:
    sweeps(comb.ctypes, len(comb), iterations, np.float32(eps))


@loop
def find_best(score: Any, out: Any) -> None:
    best(score, out)


def draw(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_exp_is_right_to_three_units_of_the_last_place() -> None:
    x = np.random.default_rng(1).uniform(-87, 88, 100_001).astype(np.float32)
    x[:3] = 0.0, -87.0, 88.0
    found = np.empty_like(x)
    exps(x, found)
    wanted = np.exp(x.astype(np.float64))
    assert np.abs(found / wanted - 1).max() < 4e-7


def test_exp_of_what_is_further_out_is_next_to_nothing_or_very_large_and_nan_stays() -> None:
    x = np.array([-np.inf, -1e30, np.inf, np.nan], np.float32)
    found = np.empty_like(x)
    exps(x, found)
    assert (found[:2] < 1e-37).all()
    assert np.isfinite(found[2])
    assert found[2] > 1e38
    assert np.isnan(found[3])


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (4, 2, 8), (17, 33, 130), (2, 64, 31)])
@pytest.mark.parametrize(("first", "to"), [(0, 0), (3, 5)])
def test_a_product_is_float64s_and_leaves_the_other_columns(
    shape: tuple[int, int, int], first: int, to: int
) -> None:
    rows, num, size = shape
    x, weight = draw(rows, first + size + 2), draw(num, size, seed=1)
    out = draw(rows, to + num + 1, seed=2)
    wanted = out.astype(np.float64)
    wanted[:, to : to + num] = x[:, first : first + size].astype(np.float64) @ weight.T
    multiply(x, weight, out, first, to)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("size", [1, 7, 32, 130])
def test_a_rows_product_is_the_same_bits_in_any_place_among_any_rows(size: int) -> None:
    x, weight = draw(23, size), draw(9, size, seed=1)
    together = np.empty((23, 9), np.float32)
    multiply(x, weight, together, 0, 0)
    order = np.random.default_rng(2).permutation(23)
    for count in (1, 2, 3, 5, 23):
        some = np.empty((count, 9), np.float32)
        multiply(x[order[:count]], weight, some, 0, 0)
        np.testing.assert_array_equal(some, together[order[:count]])


@pytest.mark.parametrize("num", [0, 1, 3, 4, 11])
def test_weighted_sums_are_float64s(num: int) -> None:
    weight, x, out = draw(3, num + 2), draw(num, 19, seed=1), draw(3, 19, seed=2)
    wanted = out + weight[:, 2:].astype(np.float64) @ x
    accumulate(weight, x, out, 2)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num", [1, 2, 4, 5])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_is_float64s_sweep_by_sweep(num: int, iterations: int) -> None:
    comb = draw(num, num, BLOCK) * 3
    wanted = np.exp(comb.astype(np.float64))
    wanted = wanted / wanted.sum(1, keepdims=True) + 1e-6
    for sweep in range(2 * iterations - 1):
        wanted = wanted / (wanted.sum(sweep % 2, keepdims=True) + 1e-6)
    balance(comb, iterations, 1e-6)
    np.testing.assert_allclose(comb, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_k", [1, 4, 9, 10])
def test_the_best_are_in_order_and_the_lowest_of_equal_ones(top_k: int) -> None:
    for seed in range(50):
        score = np.random.default_rng(seed).integers(0, 4, 10).astype(np.float32)
        found = np.full(top_k, -1, np.int64)
        find_best(score, found)
        wanted = sorted(sorted(range(10), key=lambda e: (-score[e], e))[:top_k])
        assert found.tolist() == wanted


@pytest.mark.parametrize("size", [300, 5000])
def test_the_best_are_torchs_among_zeros_of_both_signs_infinities_and_nans(size: int) -> None:
    random = np.random.default_rng(size)
    score = random.standard_normal(size).astype(np.float32) * np.float32(1e-3)
    for x in (0.0, -0.0, np.inf, -np.inf, np.nan):
        score[random.integers(0, size, size // 10)] = x
    score[: size // 10] = score[size // 10 : 2 * (size // 10)]
    for top_k in (1, size // 10, size // 2, size - size // 10, size - 1):
        found = np.full(top_k, -1, np.int64)
        find_best(score, found)
        wanted = best_in_torch(torch.from_numpy(score)[None], top_k)[0].sort().values
        np.testing.assert_array_equal(found, wanted.numpy())


def test_no_loop_calls_another_compiled_function() -> None:
    """Else a process would take whichever copy it has met first."""
    dispatcher: Any = type(find_best)

    def is_within(x: Any) -> bool:
        return x.targetoptions.get("inline") == "always"

    own = [
        x
        for module in (attention, experts, rows, sinkhorn, streams, sums)
        for x in vars(module).values()
        if isinstance(x, dispatcher)
    ]
    assert {x.__name__ for x in own if not is_within(x)} >= {"attend", "mix", "read_backward"}
    for x in own:
        called = (vars(sys.modules[x.__module__]).get(name) for name in x.py_func.__code__.co_names)
        assert all(is_within(y) for y in called if isinstance(y, dispatcher)), x
