"""Hyper-connections in loops equal hyper_connections' functions in float64: results and all
gradients."""

from typing import Any

import pytest
import torch
from small_v4 import small_model
from torch import Tensor

from posttrain.backbone import hyper_connections
from posttrain.backbone.host import connect as host
from posttrain.backbone.host.sinkhorn import BLOCK

SHAPES = [(5, 4, 6), (1, 4, 8), (0, 4, 8), (33, 3, 7), (7, 1, 9), (BLOCK + 3, 2, 5), (300, 4, 128)]
"""Tokens, streams, channels."""
NAMES = ("x", "fn", "base", "gain", "y")


def draw(shape: tuple[int, int, int], *, num: int | None = None) -> dict[str, Tensor]:
    """x, fn, base, gain and y; fn has `num` rows, as many as comb, pre and post need."""
    tokens, streams, size = shape
    num = streams * (streams + 2) if num is None else num
    shapes = {"x": shape, "fn": (num, streams * size), "base": (num,), "gain": (num,)}
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    drawn["fn"] /= size**0.5
    return drawn | {"y": torch.randn(tokens, size, generator=generator)}


def connected(module: Any, given: dict[str, Tensor], iterations: int = 20) -> tuple[Tensor, Tensor]:
    """What a block reads, and the streams after it, y being of what it read."""
    weights = (given[n] for n in NAMES[:4])
    collapsed, write = module.connect(*weights, 1e-6, 1e-3, iterations)
    return collapsed, write(given["y"] + 0.5 * collapsed)


def headed(module: Any, given: dict[str, Tensor]) -> tuple[Tensor]:
    weights = (given[n] for n in NAMES[:4])
    return (module.Head.apply(*weights, 1e-6, 1e-3),)


def run(
    function: Any, module: Any, given: dict[str, Tensor], dtype: Any, wanted: Any = NAMES
) -> list[Tensor]:
    """The results of `function`, and the gradients at `wanted` of a random weighting of them."""
    given = {n: x.to(dtype).clone().requires_grad_(n in wanted) for n, x in given.items()}
    results = function(module, given)
    generator = torch.Generator().manual_seed(1)
    pairs = [(r, torch.randn(r.shape, generator=generator).to(dtype)) for r in results]
    outputs, weights = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    gradients = torch.autograd.grad(outputs, [given[n] for n in wanted], weights)
    return [*(r.detach() for r in results), *gradients]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    """To float32's last bits of the largest number of each; gradients are sums of many."""
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        atol = 1e-5 * float(b.abs().max()) + 1e-9 if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_connect_and_write_are_float64s(shape: tuple[int, int, int], iterations: int) -> None:
    def function(module: Any, given: dict[str, Tensor]) -> Any:
        return connected(module, given, iterations)

    given = draw(shape)
    wanted = run(function, hyper_connections, given, torch.float64)
    assert_close(run(function, host, given, torch.float32), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_is_float64s(shape: tuple[int, int, int]) -> None:
    given, wanted = draw(shape, num=shape[1]), NAMES[:4]
    given["gain"] = given["gain"][:1]
    exact = run(headed, hyper_connections, given, torch.float64, wanted)
    assert_close(run(headed, host, given, torch.float32, wanted), exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_that_share_their_memory_are_taken(shape: tuple[int, int, int]) -> None:
    def function(module: Any, given: dict[str, Tensor]) -> Any:
        same = given["x"].unsqueeze(1).expand(-1, shape[1], -1)
        return connected(module, given | {"x": same})

    given = draw(shape)
    given["x"] = given["x"][:, 0]
    wanted = run(function, hyper_connections, given, torch.float64)
    assert_close(run(function, host, given, torch.float32), wanted)


def test_streams_one_after_the_other_in_memory_are_taken() -> None:
    given = draw((9, 4, 8))
    by_stream = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    found = run(connected, host, given | {"x": by_stream}, torch.float32)
    for a, b in zip(found, run(connected, host, given, torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_one_inputs_gradient_does_not_depend_on_who_else_wants_one(name: str) -> None:
    given = draw((BLOCK + 3, 4, 16))
    together = run(connected, host, given, torch.float32)[2:]
    (*_, alone) = run(connected, host, given, torch.float32, (name,))
    assert torch.equal(alone, together[NAMES.index(name)])


def test_without_gradients_the_results_are_the_same_bits() -> None:
    given = draw((BLOCK + 3, 4, 16))
    wanted = run(connected, host, given, torch.float32)
    with torch.no_grad():
        found = connected(host, given)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[:2], strict=True))


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_in_a_thread_of_its_own_gives_the_same_bits(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = draw((5 * BLOCK - 7, 4, 16))
    wanted = run(connected, host, given, torch.float32)
    cuts: list[int] = []

    def parts(blocks: int, _: int) -> list[int]:
        cuts.append(blocks)
        return [*range(part, blocks, part), blocks]

    monkeypatch.setattr("posttrain.backbone.host.parts.even", parts)
    found = run(connected, host, given, torch.float32)
    assert cuts == [5] * 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_token_does_not_see_the_others() -> None:
    """But for the product with fn, whose rows torch may round by their number: here it is exact."""
    given = draw((2 * BLOCK + 5, 4, 16))
    given["x"], given["fn"] = given["x"].mul(8).round(), given["fn"].mul(16).round()
    wanted = run(connected, host, given, torch.float32)
    for at in (slice(0, 7), slice(BLOCK - 3, BLOCK + 9), slice(2 * BLOCK + 4, None)):
        found = connected(host, {n: x[at] if n in ("x", "y") else x for n, x in given.items()})
        assert all(torch.equal(a, b[at]) for a, b in zip(found, wanted, strict=False))


def test_a_second_backward_gives_the_same_bits_and_gradients_given_stay_as_they_are() -> None:
    given = {n: x.requires_grad_() for n, x in draw((40, 4, 16)).items()}
    results = connected(host, given)
    grads = [torch.randn(r.shape, generator=torch.Generator().manual_seed(2)) for r in results]
    before = [g.clone() for g in grads]
    first = torch.autograd.grad(results, list(given.values()), grads, retain_graph=True)
    second = torch.autograd.grad(results, list(given.values()), grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, grads, strict=True))


def test_what_reads_but_does_not_write_has_its_gradient() -> None:
    def function(module: Any, given: dict[str, Tensor]) -> Any:
        return connected(module, given)[:1]

    given, wanted = draw((20, 4, 16)), NAMES[:4]
    exact = run(function, hyper_connections, given, torch.float64, wanted)
    assert_close(run(function, host, given, torch.float32, wanted), exact)


@pytest.mark.parametrize("is_float64", [False, True])
def test_a_models_streams_go_through_the_loops_in_float32(
    is_float64: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = small_model(), list[str]()
    ids, real = torch.arange(3, 40)[None], host.over_tokens

    def counted(loops: Any, *args: Any) -> None:
        calls.append(loops.__name__)
        real(loops, *args)

    monkeypatch.setattr(host, "over_tokens", counted)
    model = model.double() if is_float64 else model
    model(ids, labels=ids).loss.backward()
    num = 2 * len(model.model.layers)
    wanted = {"read_blocks": num + 1, "write": num, "write_backward": num, "read_backward": num + 1}
    found = {name: calls.count(name) for name in wanted}
    assert found == (dict.fromkeys(wanted, 0) if is_float64 else wanted)
