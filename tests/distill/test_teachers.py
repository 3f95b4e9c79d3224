"""The pool answers with what each teacher computes for a row alone, however it is asked."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

from distill import teachers
from distill.batch import Example, ScoredExample
from distill.causal_lm import hidden_states
from distill.hidden_store import HiddenRow, HiddenStore
from distill.teacher_files import Place
from distill.teacher_memory import Residents
from distill.teacher_models import Loader
from distill.teacher_rows import Reading, Row, cut, from_wire, to_wire
from distill.teachers import Teacher, TeacherPool, Teachers
from posttrain.backbone import V4ForCausalLM
from posttrain.checkpoints import load_model, save_checkpoint
from posttrain.errors import CheckpointError
from posttrain.job import LocalRole
from posttrain.tokenizer import build_tokenizer

NAMES = ("specialist/code", "specialist/llama", "specialist/mathematics")


@pytest.fixture(scope="module")
def folders(stages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two V4 teachers, and a Llama of another hidden size whose head is its embedding."""
    llama = tmp_path_factory.mktemp("llama") / "checkpoint"
    save_checkpoint(llama_model(), build_tokenizer(), llama)
    of_v4 = {name: stages[name] / "checkpoint" for name in NAMES if name in stages}
    return {**of_v4, "specialist/llama": llama}


def llama_model(**config: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    sizes |= {"vocab_size": len(build_tokenizer()), **config}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def test_a_teacher_is_whole_though_another_thread_makes_skeletons(folders: dict[str, Path]) -> None:
    is_over = threading.Event()

    def make_skeletons() -> None:
        while not is_over.is_set():
            Loader(dtype=torch.float32, device="cpu").skeleton(folders["specialist/code"])

    thread = threading.Thread(target=make_skeletons)
    thread.start()
    try:
        loader = Loader(dtype=torch.float32, device="cpu")
        weights = loader.read(folders["specialist/llama"])
        for _ in range(20):
            model = loader.assemble(weights).base_model
            assert not any(parameter.is_meta for parameter in model.parameters())
    finally:
        is_over.set()
        thread.join()


def examples(count: int = 10, seed: int = 0) -> list[Example]:
    """Of all teachers, of 1 to 20 tokens, at some of their positions."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Example] = []
    for number in range(count):
        length = int(torch.randint(1, 21, (), generator=generator))
        input_ids = torch.randint(3, 200, (length,), generator=generator).tolist()
        positions = sorted({0, length // 2, length - 1})
        names = [NAMES[number % len(NAMES)]]
        found.append(example(input_ids, positions, *names))
    return found


def example(input_ids: list[int], positions: list[int], *names: str) -> Example:
    weights = {name: 1 / len(names) for name in names}
    return Example(
        "d",
        weights,
        input_ids,
        positions,
        sampled=[3] * len(positions),
        sampler_logp=[0.0] * len(positions),
    )


def only(row: ScoredExample) -> Tensor:
    """What a row's only teacher says."""
    return row.hidden(row.example.teacher_names[0])


def file_of(row: ScoredExample) -> str:
    (found,) = row.teacher_hidden.values()
    assert isinstance(found, HiddenRow)
    return Path(found.path).name


def alone(folders: dict[str, Path], example: Example, name: str = "") -> Tensor:
    """A dense forward of the one row, not padded."""
    model: Any = load_model(folders[name or example.teacher_names[0]])
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([example.input_ids])).last_hidden_state
    return hidden[0, example.positions]


@pytest.fixture
def ask(folders: dict[str, Path], tmp_path: Path) -> Callable[..., list[ScoredExample]]:
    """`ask(examples, rows_per_batch=, **pool)` in a store of its own each time."""
    count = 0

    def asked(wanted: list[Example], *, rows_per_batch: int = 4, **pool: Any) -> Any:
        nonlocal count
        count += 1
        store = HiddenStore(tmp_path / f"hidden-{count}", memory_bytes=0)
        return make_teachers(folders, store, rows_per_batch=rows_per_batch, **pool).ask(wanted)()

    return asked


def make_teachers(
    folders: dict[str, Path], store: HiddenStore, *, rows_per_batch: int = 4, **pool: Any
) -> Teachers:
    role = LocalRole("distill.teachers:TeacherPool", {"device": "cpu", **pool})

    def examine(name: str) -> Teacher:
        return Teacher(name, folders[name], name, hidden_size=32)

    made = Teachers([role], examine, store=store, rows_per_batch=rows_per_batch, timeout_s=1.0)
    made.hire(folders)
    return made


@pytest.mark.parametrize("rows_per_batch", [1, 3, 64])
def test_hidden_states_are_those_of_the_unpadded_row(
    folders: dict[str, Path], ask: Callable[..., list[ScoredExample]], rows_per_batch: int
) -> None:
    rows = ask(examples(), rows_per_batch=rows_per_batch)
    assert [row.example for row in rows] == examples()
    for row in rows:
        wanted = alone(folders, row.example)
        torch.testing.assert_close(only(row), wanted, rtol=0, atol=2e-5)
    assert {only(row).shape[1] for row in rows} == {32, 48}


def test_all_teachers_of_a_row_read_it(
    folders: dict[str, Path], ask: Callable[..., list[ScoredExample]]
) -> None:
    several = [example([5, 9, 40], [0, 2], *NAMES), example([7, 8], [1], *NAMES[:2])]
    for row in ask(several, rows_per_batch=1):
        for name in row.example.teacher_names:
            wanted = alone(folders, row.example, name)
            torch.testing.assert_close(row.hidden(name), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pool", [{"capacity": 1}, {"max_gb": 1e-6}, {}])
def test_order_and_teachers_in_memory_change_no_bit(
    ask: Callable[..., list[ScoredExample]], pool: dict[str, Any]
) -> None:
    wanted = ask(examples(), capacity=8)
    for row, other in zip(ask(examples()[::-1], **pool)[::-1], wanted, strict=True):
        assert torch.equal(only(row), only(other))


def test_a_filled_skeleton_is_the_loaded_model_to_the_bit(folders: dict[str, Path]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loader = Loader(dtype=dtype, device="cpu")
        for folder in (folders[name] for name in NAMES * 2):  # a skeleton is used twice
            model, wanted = loader.assemble(loader.read(folder)), load_model(folder, dtype=dtype)
            for parameter in wanted.parameters():  # transformers maps the file, at odd addresses
                parameter.data = parameter.data.clone()
            ids = torch.tensor([[5, 9, 77, 30, 4]])
            with torch.no_grad():
                found = hidden_states(model, ids, torch.ones_like(ids))
                assert torch.equal(found, hidden_states(wanted, ids, torch.ones_like(ids)))


def test_a_checkpoint_of_several_files_is_read_file_by_file(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model: Any = load_model(folders[NAMES[0]])
    model.save_pretrained(tmp_path / "bin", max_shard_size="50KB")  # several files and an index
    sharded = Loader(dtype=torch.float32, device="cpu")
    assert sharded.can_read_ahead(tmp_path / "bin")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(list((tmp_path / "bin").glob("*.safetensors"))) > 1
    read = sharded.read(tmp_path / "bin").tensors
    assert all(torch.equal(tensor, whole[name]) for name, tensor in read.items())


def test_the_head_is_the_teachers_own_with_its_bias_and_scale(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    loader = Loader(dtype=torch.float32, device="cpu")
    wanted = load_model(folders["specialist/code"]).state_dict()["lm_head.weight"]
    assert torch.equal(loader.head(folders["specialist/code"]).weight, wanted)
    tied: Any = load_model(folders["specialist/llama"])
    assert torch.equal(
        loader.head(folders["specialist/llama"]).weight, tied.model.embed_tokens.weight
    )
    cohere: Any = CohereForCausalLM(
        CohereConfig(
            vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, logit_scale=0.25,
        )
    ).eval()  # fmt: skip
    save_checkpoint(cohere, build_tokenizer(), tmp_path / "cohere")
    ids = torch.tensor([[5, 9, 30]])
    head = loader.head(tmp_path / "cohere")
    with torch.no_grad():
        hidden = cohere.base_model(ids).last_hidden_state
        logits = head.scale * (hidden @ head.weight.T)
        torch.testing.assert_close(logits, cohere(ids).logits, rtol=0, atol=1e-6)
    cohere.config.final_logit_softcapping = 30.0
    save_checkpoint(cohere, build_tokenizer(), tmp_path / "capped")
    with pytest.raises(CheckpointError, match="capped changes its logits by final_logit_softcap"):
        loader.head(tmp_path / "capped")


def test_bfloat16_teachers_answer_in_two_bytes_a_number(
    folders: dict[str, Path], ask: Callable[..., list[ScoredExample]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(5, 3, generator=generator).bfloat16()
    assert to_wire(tensor).dtype == "uint16"
    assert torch.equal(from_wire(to_wire(tensor)), tensor)
    for row in ask(examples(3), dtype="bfloat16"):
        assert only(row).dtype == torch.bfloat16
        wanted = alone(folders, row.example)
        torch.testing.assert_close(only(row).float(), wanted, rtol=0.1, atol=0.15)


def test_a_worker_that_cannot_see_the_store_sends_the_rows(folders: dict[str, Path]) -> None:
    pool = TeacherPool(device="cpu")
    rows = [Row(e.input_ids, e.positions, "/nowhere/row") for e in examples(2)]
    found = pool.score([Reading(str(folders[NAMES[0]]), [rows], 1)])[0]
    for array, asked in zip(found, examples(2), strict=True):
        assert array is not None
        wanted = alone(folders, asked, NAMES[0])
        torch.testing.assert_close(from_wire(array), wanted, rtol=0, atol=2e-5)


def test_an_array_that_may_not_be_written_is_read_all_the_same() -> None:
    array = to_wire(torch.arange(4.0))
    array.flags.writeable = False  # what a Ray worker gets
    assert torch.equal(from_wire(array), torch.arange(4.0))


def test_teachers_leave_memory_by_number_and_by_bytes(folders: dict[str, Path]) -> None:
    loader = Loader(dtype=torch.float32, device="cpu")
    one = loader.read(folders["specialist/code"]).num_bytes
    for capacity, max_bytes in ((1, 1e12), (9, 1.5 * one)):
        residents = Residents(loader, capacity=capacity, max_bytes=max_bytes)
        first = weakref.ref(residents(Place(folders["specialist/code"])))
        assert first() is not None
        residents.expect(Place(folders["specialist/mathematics"]))
        residents(Place(folders["specialist/mathematics"]))
        gc.collect()
        assert first() is None
    both = Residents(loader, capacity=2, max_bytes=2 * one)
    first = weakref.ref(both(Place(folders["specialist/code"])))
    both(Place(folders["specialist/mathematics"]))
    assert both(Place(folders["specialist/code"])) is first()


def test_a_batch_holds_no_more_rows_and_tokens_than_it_may() -> None:
    rows = [Row(e.input_ids, e.positions, str(i)) for i, e in enumerate(examples(30))]
    batches = cut(rows, num_rows=4, num_tokens=40)
    for batch in batches:
        longest = max(len(row.input_ids) for row in batch)
        assert len(batch) == 1 or (len(batch) <= 4 and len(batch) * longest <= 40)
    assert sorted(row.path for batch in batches for row in batch) == sorted(r.path for r in rows)
    assert cut(rows[::-1], num_rows=4, num_tokens=40) == batches


def test_no_more_rows_than_asked_for_are_read_at_once(
    ask: Callable[..., list[ScoredExample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def read(model: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        sizes.append(len(input_ids_BS))
        return hidden_states(model, input_ids_BS, attention_mask_BS)

    monkeypatch.setattr(teachers, "hidden_states", read)
    ask(examples(12), rows_per_batch=3)
    assert sizes == [3, 1] * 3  # four rows of each teacher


def test_scored_rows_are_not_scored_again_after_a_restart(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def store() -> HiddenStore:
        return HiddenStore(tmp_path / "hidden", memory_bytes=0)

    first = make_teachers(folders, store()).ask(examples())()
    wanted = [only(row).clone() for row in first]
    (tmp_path / "hidden" / file_of(first[2])).unlink()
    untouched = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "hidden").iterdir()}
    rows = make_teachers(folders, store()).ask(examples())()
    assert all(torch.equal(only(row), x) for row, x in zip(rows, wanted, strict=True))
    again = {
        p.name for p in (tmp_path / "hidden").iterdir()
        if untouched.get(p.name) != p.stat().st_mtime_ns
    }  # fmt: skip
    of_teacher = {file_of(row) for row in first[2::3]}
    assert again <= of_teacher  # its batch alone, so that its bits are the same
    assert file_of(first[2]) in again


def test_freed_rows_leave_the_store_and_stay_with_who_reads_them(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    store = HiddenStore(tmp_path / "hidden", memory_bytes=0)
    asked = make_teachers(folders, store)
    rows = asked.ask(examples())()
    held, value = only(rows[0]), only(rows[0]).clone()
    asked.free(rows)
    assert len(store) == 0
    assert torch.equal(held, value)


def test_two_steps_that_read_the_same_rows_free_them_one_by_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = make_teachers(folders, HiddenStore(tmp_path / "hidden", memory_bytes=0))
    first, second = (asked.ask(examples(), step=step)() for step in (4, 5))
    asked.free(first)
    assert len(second) == len(first)
    assert {file_of(row) for row in second} <= {
        path.name for path in (tmp_path / "hidden").iterdir()
    }
    assert not {file_of(row) for row in first} & {file_of(row) for row in second}


def test_a_teacher_that_cannot_be_loaded_is_an_error_of_the_answer(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path / "hidden", memory_bytes=0)
    asked = make_teachers({"t": tmp_path / "none"}, store)
    with pytest.raises(CheckpointError, match="none"):
        asked.ask([example([3], [0], "t")])()


def test_weights_that_do_not_fit_their_config_are_refused(
    make_model: Callable[..., V4ForCausalLM], tmp_path: Path
) -> None:
    save_checkpoint(make_model(0, 275), build_tokenizer(), tmp_path / "t")
    config = tmp_path / "t" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 40'))
    with pytest.raises(CheckpointError, match=r"do not fit its config.json: .* is \("):
        Loader(dtype=torch.float32, device="cpu").read(tmp_path / "t")
