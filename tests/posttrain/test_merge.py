"""Weight-space merges against arithmetic by hand."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.checkpoints import load_model, save_checkpoint
from posttrain.errors import CheckpointError
from posttrain.job import Job
from posttrain.merge import average, task_arithmetic, ties, work
from posttrain.merge_config import MergeStage
from posttrain.metrics import Metrics
from posttrain.tokenizer import build_tokenizer

ROLES = ("base", "specialist/code", "specialist/mathematics")
TABLE = torch.tensor([3, 1, 2])


def state(*values: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model of one weight and one table of expert numbers."""
    return {"weight": torch.tensor(values, dtype=dtype), "tid2eid": TABLE.clone()}


def test_the_average_by_hand() -> None:
    merged = average([state(1, 2), state(3, 6)])
    torch.testing.assert_close(merged["weight"], torch.tensor([2.0, 4.0]))
    weighted = average([state(1, 2), state(3, 6)], [3, 1])  # 3/4 and 1/4
    torch.testing.assert_close(weighted["weight"], torch.tensor([1.5, 3.0]))


def test_task_arithmetic_by_hand() -> None:
    # deltas (1, 0) and (2, -4); the base plus half of their sum
    merged = task_arithmetic(state(1, 1), [state(2, 1), state(3, -3)], scale=0.5)
    torch.testing.assert_close(merged["weight"], torch.tensor([2.5, -1.0]))


def test_ties_by_hand() -> None:
    base = state(1, 1, 1, 1)
    # deltas (4, -1, 3, .1) and (2, 3, -5, .2), of which half stay: (4, 0, 3, 0), (0, 3, -5, 0)
    # signs of the sums (4, 3, -2, 0): +, +, -, none; the third keeps the second model's -5 alone
    models = [state(5, 0, 4, 1.1), state(3, 4, -4, 1.2)]
    merged = ties(base, models, density=0.5, scale=1.0)
    torch.testing.assert_close(merged["weight"], torch.tensor([5.0, 4.0, -4.0, 1.0]))
    scaled = ties(base, models, density=0.5, scale=0.5)
    torch.testing.assert_close(scaled["weight"], torch.tensor([3.0, 2.5, -1.5, 1.0]))


def test_ties_trims_over_the_whole_model_not_each_tensor() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    model = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([2.0, 1.0])}
    merged = ties(base, [model], density=0.5)
    assert torch.equal(merged["a"], model["a"])
    assert torch.equal(merged["b"], torch.zeros(2))


def test_ties_of_one_model_at_full_density_is_that_model() -> None:
    merged = ties(state(1, 1, 1), [state(2, -3, 1)], density=1.0)
    assert torch.equal(merged["weight"], torch.tensor([2.0, -3.0, 1.0]))


def test_ties_keeps_one_number_at_least() -> None:
    merged = ties(state(1, 1, 1), [state(2, -3, 1)], density=1e-9)
    torch.testing.assert_close(merged["weight"], torch.tensor([1.0, -3.0, 1.0]))


def test_no_arithmetic_touches_an_integer() -> None:
    table = torch.tensor([2**24 + 1, 2**31 - 1, 7])  # no float32 holds the first two
    models = [{**state(i, 2), "tid2eid": table.clone()} for i in range(3)]
    for merged in (average(models), task_arithmetic(models[0], models), ties(models[0], models)):
        assert torch.equal(merged["tid2eid"], table)


def test_models_equal_to_the_base_merge_into_the_base() -> None:
    base = state(0.1, -2, 7)
    for merged in (
        average([base, base, base]),
        task_arithmetic(base, [base, base]),
        ties(base, [base, base]),
    ):
        torch.testing.assert_close(merged["weight"], base["weight"], rtol=1e-7, atol=0)
        assert torch.equal(merged["tid2eid"], TABLE)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_the_order_of_models_changes_nothing(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = [state(*torch.randn(50, generator=generator).tolist()) for _ in range(4)]

    def merge(models: list[dict[str, Tensor]]) -> Tensor:
        if method == "average":
            return average(models)["weight"]
        return (ties if method == "ties" else task_arithmetic)(base, models)["weight"]

    torch.testing.assert_close(merge(models), merge(models[::-1]), rtol=1e-6, atol=1e-6)


def test_bfloat16_models_are_merged_in_float32() -> None:
    # a bf16 sum of ones stops growing at 256, where the next one is half a unit in the last place
    models = [state(1 + 2**-7, dtype=torch.bfloat16)] * 256
    merged = average(models)["weight"]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1 + 2**-7


def test_integer_tables_are_copied_and_have_to_be_equal() -> None:
    models = [state(1), state(2)]
    assert torch.equal(average(models)["tid2eid"], TABLE)
    models[1]["tid2eid"][0] = 0
    with pytest.raises(CheckpointError, match="'tid2eid' holds integers that differ"):
        average(models)


def test_other_shapes_and_missing_tensors_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"'weight' is \(2,\) in the first .* \(3,\)"):
        average([state(1, 2), state(1, 2, 3)])
    with pytest.raises(CheckpointError, match="'bias' is only in number 2"):
        ties(state(1), [{**state(1), "bias": torch.ones(1)}])


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Stage folders of a base and of two specialists made from it."""
    tokenizer = build_tokenizer()
    config = preset_config(
        "tiny", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    config.update({"hidden_size": 32, "moe_intermediate_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = V4ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    folders = {role: tmp_path / role.replace("/", ".") for role in ROLES}
    for folder in folders.values():
        folder.mkdir()
        save_checkpoint(model, tokenizer, folder / "checkpoint")
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return folders


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_the_stage_writes_the_checkpoint_its_method_gives(
    inputs: dict[str, Path], tmp_path: Path, method: Literal["average", "task_arithmetic", "ties"]
) -> None:
    out = tmp_path / "merge"
    job = Job(
        out, inputs, tmp_path, seed=0, num_threads=1,
        metrics=Metrics(out / "metrics.jsonl", stage="merge"),
    )  # fmt: skip
    work(MergeStage(method=method, density=0.3, scale=0.7), job)
    base, *models = (load_model(inputs[role] / "checkpoint").state_dict() for role in ROLES)
    wanted = {
        "average": lambda: average(models),
        "task_arithmetic": lambda: task_arithmetic(base, models, scale=0.7),
        "ties": lambda: ties(base, models, density=0.3, scale=0.7),
    }[method]()
    merged = load_model(out / "checkpoint").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
    tables = [name for name in base if name.endswith("tid2eid")]
    assert tables
    assert all(torch.equal(merged[name], base[name]) for name in tables)
