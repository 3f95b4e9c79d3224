"""Workers sample what the learner's own engine would, with exactly the weights they were given."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.job import LocalRole
from posttrain.rollout import Request, Rollout
from posttrain.rollout.engine import Engine
from posttrain.rollout.journal import Journal
from posttrain.rollout.weights import copy_weights, load_weights, named_tensors
from posttrain.rollout.worker import RolloutWorkers, run_written

VOCAB = 40


def make_model(seed: int, **sizes: Any) -> V4ForCausalLM:
    config = preset_config("tiny", vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    small = {"hidden_size": 32, "moe_intermediate_size": 16, "sliding_window": 6, "index_topk": 3}
    config.update({**small, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = V4ForCausalLM(config)
        model.lm_head.weight.data *= 20
        for name, buffer in model.named_buffers():
            if "bias" in name:  # the router's: zero in a new model
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    make_model(0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_workers(checkpoint: str) -> Callable[[int], RolloutWorkers]:
    def make(num_workers: int) -> RolloutWorkers:
        kwargs = {"checkpoint": checkpoint, "num_slots": 3, "seed": 0}
        path = "posttrain.rollout.worker:RolloutWorker"
        roles = [LocalRole(path, kwargs) for _ in range(num_workers)]
        return RolloutWorkers(roles, timeout_s=60)

    return make


def requests(count: int = 11) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            prompt_id=f"p{i}",
            prompt=torch.randint(3, VOCAB, (1 + i % 5,), generator=generator).tolist(),
            max_new_tokens=1 + 3 * (i % 4),
            stop_token_ids=(1,),
        )
        for i in range(count)
    ]


def by_prompt(rollouts: Any) -> dict[str, Rollout]:
    return {rollout.prompt_id: rollout for rollout in rollouts}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_sample_what_one_engine_samples_with_these_weights(
    make_workers: Callable[[int], RolloutWorkers], num_workers: int
) -> None:
    model, workers = make_model(1), make_workers(num_workers)
    workers.load(5, copy_weights(model))
    wanted = by_prompt(Engine(model, num_slots=3, seed=0).run(requests()))
    found = by_prompt(workers.run(requests()))
    assert {name: r.response for name, r in found.items()} == {
        name: r.response for name, r in wanted.items()
    }
    assert {rollout.version for rollout in found.values()} == {5}


def test_requests_take_the_place_of_those_before(
    make_workers: Callable[[int], RolloutWorkers],
) -> None:
    workers = make_workers(2)
    next(iter(workers.run(requests())))  # the rest is left
    assert len(by_prompt(workers.run(requests(5)))) == 5
    assert list(workers.run([])) == []


def num_written(folder: Path) -> int:
    """Tokens in all journals of a folder."""
    lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    records = [json.loads(line.partition(" ")[2]) for line in lines]
    return sum(len(record.get("tokens", ())) for record in records)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_were_lost_half_way_are_followed_by_some_that_sample_the_rest_alone(
    make_workers: Callable[[int], RolloutWorkers],
    num_workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied, asked = copy_weights(make_model(1)), requests(45)
    wanted = by_prompt(Engine(make_model(1), num_slots=3, seed=0).run(asked))
    path, counts, num_sampled = tmp_path / "7.journal", list[int](), list[int]()
    write = Journal.tokens

    def count(journal: Journal, taken: Sequence[Any]) -> None:
        num_sampled.append(len(taken))
        write(journal, taken)

    monkeypatch.setattr(Journal, "tokens", count)
    for _ in range(2):
        lost = make_workers(num_workers)
        lost.load(5, copied)
        next(iter(lost.run(asked, path)))
        del lost
        counts.append(num_written(tmp_path))
    workers = make_workers(num_workers)
    workers.load(5, copied)
    found = by_prompt(workers.run(asked, path))
    assert found == {name: replace(r, version=5) for name, r in wanted.items()}
    total = sum(len(rollout.response) for rollout in wanted.values())
    assert 0 < counts[0] <= counts[1] < total
    assert num_written(tmp_path) == sum(num_sampled) == total  # no token twice


@pytest.mark.parametrize("harm", ["other weights", "another version", "damage"])
def test_what_other_weights_sampled_or_is_damaged_is_sampled_anew(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = make_model(1), tmp_path / "7.journal"
    before = Engine(make_model(2) if harm == "other weights" else model, num_slots=3, seed=0)
    before.version = 4 if harm == "another version" else 0
    list(run_written(before, requests(), path))
    if harm == "damage":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    engine = Engine(model, num_slots=3, seed=0)
    wanted = by_prompt(engine.run(requests()))
    assert by_prompt(run_written(engine, requests(), path)) == wanted
    assert "is sampled anew" in caplog.text
    assert num_written(tmp_path) == sum(len(rollout.response) for rollout in wanted.values())


def test_a_journal_is_waited_for_while_a_killed_runs_worker_has_it(tmp_path: Path) -> None:
    held = Journal(tmp_path / "journal")
    threading.Timer(0.2, held.close).start()
    Journal(tmp_path / "journal", wait_s=20).close()


def test_weights_are_parameters_and_buffers_and_stay_as_they_were_copied() -> None:
    learner, sampler = make_model(1), make_model(2)
    before = {name: tensor.clone() for name, tensor in named_tensors(learner).items()}
    assert any("bias" in name for name in before)
    copied = copy_weights(learner)
    for tensor in named_tensors(learner).values():  # it learns on
        tensor.data.copy_(torch.zeros_like(tensor))
    load_weights(sampler, copied)
    assert all(torch.equal(tensor, before[n]) for n, tensor in named_tensors(sampler).items())


def test_weights_of_half_precision_and_of_every_shape_travel_bit_for_bit() -> None:
    def make() -> torch.nn.Module:
        module = torch.nn.Linear(3, 5).bfloat16()
        module.register_buffer("scalar", torch.tensor(7))
        module.register_buffer("table", torch.tensor([[True, False]]))
        module.register_buffer("empty", torch.empty(0, 2), persistent=False)
        return module

    one, other = make(), make()
    one.scalar.fill_(3)  # type: ignore[operator]
    copied = copy_weights(one)
    for array in copied.values():
        array.setflags(write=False)  # as it comes out of shared memory
    load_weights(other, copied)
    wanted = named_tensors(one)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named_tensors(other).items())


def test_weights_of_another_model_are_refused_before_any_is_overwritten() -> None:
    model = make_model(1)
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match="bytes there"):
        load_weights(model, copy_weights(make_model(2, moe_intermediate_size=32)))
    fewer = dict(copy_weights(make_model(2)))
    fewer.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"lm_head\.weight is in one of them only"):
        load_weights(model, fewer)
    assert torch.equal(model.lm_head.weight, before)
