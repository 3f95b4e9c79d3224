"""The GPU benchmark, tried at tiny sizes by triton's interpreter; what fails costs its own rows."""

import dataclasses
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from posttrain.backbone import kernels

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, whose calls are few and whose sizes are tiny."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module: Any = import_module("gpu_kernels")
    tiny = module.gpu_rows.Sizes(2, 2, 16, 3, 4, 9, 2, 16, 8, (1, 3, 32), torch.float32)
    monkeypatch.setattr(module.gpu_rows, "SMALL", tiny)
    monkeypatch.setattr(module.gpu_rows, "Sizes", lambda: dataclasses.replace(tiny, tokens=1))
    monkeypatch.setattr(module, "CALLS_S", 0.0)
    return module


@pytest.mark.parametrize(
    ("part", "num_rows", "most"),
    [("attention", 2, 1e-5), ("indexer", 1, 0.0), ("mhc", 3, 1e-5), ("mxfp4", 3, 0.0)],
)
def test_every_kernel_is_measured_and_near_its_reference(
    part: str, num_rows: int, most: float, device: torch.device, bench: Any
) -> None:
    rows = list(bench.work(part, device))
    assert len(rows) == num_rows
    for row in rows:
        assert "failure" not in row, row
        assert row["error"] <= most
        assert row["small_error"] <= most
        assert bench.kernel_line(row).count("|") == 10


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_steps_with_and_without_kernels_and_stocks_agree(
    kind: str, device: torch.device, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = bench.gpu_steps.Step(kind, 2, 9, dtype=torch.float32)
    monkeypatch.setattr(bench.gpu_steps, "steps", lambda _: [step])
    (row,) = bench.work("tiny", device)
    assert not [key for key in row if key.endswith("failure")], row
    assert bench.step_line(row).count("|") == 11
    if kind == "train":  # a decode step's number is of another step each time
        losses = [row[f"{name}_loss"] for name in ("kernels", "torch", "stock")]
        assert losses == pytest.approx(losses[:1] * 3, abs=1e-4)


def test_a_variant_that_fails_leaves_the_others(
    device: torch.device, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench.gpu_steps, "stock_decode", broken)
    row = bench.measure_step(bench.gpu_steps.Step("decode", 1, 3, dtype=torch.float32), device)
    assert row["stock_failure"] == "RuntimeError: out of memory"
    assert row["kernels_ms"] > 0
    data = {**bench.blank(), "rows": [{"part": "decode", "name": "one", **row}]}
    assert "- one, stock_failure: RuntimeError: out of memory" in bench.page(data)
    assert "| one | 1 x 3 | - |" in bench.page(data)


def test_every_preset_makes_a_model(bench: Any) -> None:
    for part in bench.STEPS:
        for step in bench.gpu_steps.steps(part):
            config = bench.gpu_steps.make_config(step.model)
            with torch.device("meta"):
                bench.gpu_steps.V4ForCausalLM(config)


def test_what_was_measured_before_a_failure_is_kept(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = json.dumps({"name": "one", "failure": "its own"})
    code = f"import sys, time; print({row!r}, flush=True); "
    scripts = {"broken": code + "sys.exit('the device is gone')", "tests": "print('3 passed')"}
    monkeypatch.setattr(bench, "command_of", lambda part: [sys.executable, "-c", scripts[part]])
    bench.everything({"broken": 30, "tests": 30}, tmp_path / "page.md")
    data = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert [found["part"] for found in data["rows"]] == ["broken", "tests"]
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "- one, failure: its own" in page
    assert "- broken: exit status 1; the device is gone" in page
    assert "Kernels' tests: 3 passed." in page
    late = bench.run_part([sys.executable, "-c", code + "time.sleep(60)"], 1.0)
    assert late == ([json.loads(row)], "stopped after 1 s")


def test_a_part_without_time_is_not_begun(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "TOTAL_S", 1)
    bench.everything({"mhc": 60}, tmp_path / "page.md")
    assert "- mhc: not begun, the run's 1 s were over" in (tmp_path / "page.md").read_text("utf-8")


def test_the_parts_fit_into_eight_minutes(bench: Any) -> None:
    assert bench.TOTAL_S <= 460


def test_without_kernels_is_for_its_block_alone(bench: Any) -> None:
    assert kernels._has_triton()
    with bench.without_kernels():
        assert not kernels._has_triton()
    with bench.without_kernels(False):
        assert kernels._has_triton()
    assert kernels._has_triton()
