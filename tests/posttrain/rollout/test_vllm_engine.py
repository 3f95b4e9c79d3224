"""vLLM behind the engine's calls. Where it is not installed, all but the refusals is left out."""

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from at_hand import VOCAB, make_requests
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.rollout import Request, Rollout
from posttrain.rollout.journal import Journal
from posttrain.rollout.vllm_engine import VllmEngine, checked
from posttrain.rollout.weights import copy_weights
from posttrain.rollout.worker import RolloutWorker

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")


def make_model(seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
        )
        model: Any = LlamaForCausalLM(config)
        model.lm_head.weight.data *= 20
    return model.eval()


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setitem(os.environ, "VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VllmEngine(make_model(0), num_slots=4, seed=3, options={"enforce_eager": True})
        yield engine
        engine.close()


def run(engine: VllmEngine, requests: list[Request]) -> dict[tuple[str, int], Rollout]:
    return {(r.prompt_id, r.sample): r for r in engine.run(requests)}


@torch.no_grad()
def logits_of(model: Any, rollout: Rollout) -> Tensor:
    """Before each token of the response."""
    ids = torch.tensor([rollout.prompt + rollout.response])
    return model(ids).logits[0, len(rollout.prompt) - 1 : -1].double()


def check_logps(model: Any, rollout: Rollout, temperature: float) -> None:
    logp = (logits_of(model, rollout) / temperature).log_softmax(-1)
    wanted = logp.gather(1, torch.tensor(rollout.response)[:, None]).squeeze(1)
    own = torch.tensor(rollout.is_own)
    torch.testing.assert_close(
        torch.tensor(rollout.logp, dtype=torch.float64)[own], wanted[own], atol=1e-4, rtol=1e-4
    )


@needs_vllm
def test_greedy_tokens_are_the_argmax_of_full_forwards(engine: VllmEngine) -> None:
    asked = make_requests(9, longest=60, temperature=0.0)
    found = run(engine, asked)
    assert len(found) == 9
    for rollout in found.values():
        best = logits_of(engine.model, rollout).argmax(-1).tolist()
        assert rollout.response == best
        check_logps(engine.model, rollout, 1.0)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_tempered_distribution(
    engine: VllmEngine, temperature: float
) -> None:
    asked = make_requests(5, temperature=temperature)
    asked += [replace(asked[0], sample=n) for n in range(1, 4)]
    found = run(engine, asked)
    for rollout in found.values():
        check_logps(engine.model, rollout, temperature)
    samples = [found["p0", n].response for n in range(4)]
    assert samples[0] not in samples[1:]
    for rollout in found.values():
        ends = [i for i, token in enumerate(rollout.response) if token in (1, 5)]
        is_cut = rollout.finish_reason == "length"
        assert ends == ([] if is_cut else [len(rollout.response) - 1])
        assert len(rollout.response) == 24 or not is_cut


@needs_vllm
def test_a_tool_is_heard_and_its_tokens_are_not_the_models(engine: VllmEngine) -> None:
    told: list[list[int]] = []

    def slow(own: list[int]) -> Future[list[int] | None]:
        told.append(list(own))
        said: Future[list[int] | None] = Future()
        Timer(0.05, said.set_result, [[7, 8, 9] if len(told) < 4 else None]).start()
        return said

    (request,) = make_requests(1, max_new_tokens=60)
    request = replace(request, continue_turn=slow, stop_token_ids=tuple(range(1, VOCAB, 2)))
    rollout = run(engine, [request])["p0", 0]
    assert len(told) >= 2
    said = [t for t, own in zip(rollout.response, rollout.is_own, strict=True) if not own]
    assert said == [7, 8, 9] * (len(said) // 3)
    assert said
    check_logps(engine.model, rollout, 1.0)


@needs_vllm
def test_new_weights_are_sampled_from_between_runs_and_within_one(engine: VllmEngine) -> None:
    other = make_model(1).state_dict()
    first = {name: x.clone() for name, x in engine.model.state_dict().items()}
    asked = [replace(r, temperature=0.0, stop_token_ids=()) for r in make_requests(3)]
    asked[0] = replace(asked[0], max_new_tokens=3)
    coming = engine.run(asked)
    assert next(coming).prompt_id == "p0"
    engine.update(7, lambda: engine.model.load_state_dict(other))
    for rollout in coming:
        place = rollout.versions.index(7)
        best = logits_of(engine.model, rollout).argmax(-1).tolist()
        assert rollout.response[place:] == best[place:]
        assert 0 < place < len(rollout.response)
    engine.model.load_state_dict(first)
    engine.version = 8
    for rollout in run(engine, asked).values():
        assert rollout.response == logits_of(engine.model, rollout).argmax(-1).tolist()
        assert rollout.version == 8


@needs_vllm
def test_a_run_goes_on_from_its_journal(engine: VllmEngine, tmp_path: Path) -> None:
    asked = [replace(r, stop_token_ids=()) for r in make_requests(7)]
    asked[1] = replace(asked[1], max_new_tokens=6)
    engine.journal = Journal(tmp_path / "journal")
    coming = engine.run(asked)
    ended = {r.prompt_id: r for r in islice(coming, 1)}
    coming.close()  # pyright: ignore[reportAttributeAccessIssue]
    engine.journal.close()
    engine.journal = Journal(tmp_path / "journal")
    seen: dict[str, int] = {}
    engine._on_token = lambda request, response: seen.setdefault(request.prompt_id, len(response))  # pyright: ignore
    found = {r.prompt_id: r for r in engine.run(asked)}
    engine._on_token, engine.journal = None, None  # pyright: ignore
    assert {name: found[name] for name in ended} == ended
    assert not ended.keys() & seen.keys()
    assert any(first > 1 for first in seen.values())
    assert {len(rollout.response) for rollout in found.values()} == {6, 24}
    for rollout in found.values():
        check_logps(engine.model, rollout, 1.0)


@needs_vllm
def test_a_worker_samples_from_the_weights_that_it_is_sent(
    engine: VllmEngine, tmp_path: Path
) -> None:
    """`engine` has set vLLM's environment."""
    sent = make_model(2)
    make_model(1).save_pretrained(tmp_path)
    worker = RolloutWorker(str(tmp_path), num_slots=4, seed=3, vllm={"enforce_eager": True})
    worker.load(5, copy_weights(sent))
    worker.start([replace(r, temperature=0.0) for r in make_requests(5)])
    found = worker.take()
    assert len(found) == 5
    for rollout in found:
        assert rollout.response == logits_of(sent, rollout).argmax(-1).tolist()
        assert rollout.version == 5


@pytest.mark.parametrize("field", [{"top_p": 0.9}, {"top_k": 4}, {"wants_routes": True}])
def test_what_vllm_does_not_report_is_refused(field: dict[str, Any]) -> None:
    (request,) = make_requests(1)
    with pytest.raises(ValueError, match=f"{next(iter(field)).replace('_', '.')}.*use the backend"):
        checked(replace(request, **field))
    assert checked(request) is request


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed")
def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="needs the package vllm"):
        VllmEngine(make_model(0), num_slots=2, seed=0)
