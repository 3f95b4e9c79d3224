"""`small_v4` and `trl_steps` are importable by name; what trainers need and leave behind."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.tokenizer import build_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def forget_accelerate() -> Iterator[None]:
    """Its state is of the process: a trainer in bf16 would decide for whoever comes after."""
    yield
    state: Any = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL's trainers report every run to the hub, but not from CI


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()
