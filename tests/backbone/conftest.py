"""`small_v4` and `trl_steps` are importable by name; accelerate forgets each test's trainer."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def forget_accelerate() -> Iterator[None]:
    """Its state is of the process: a trainer in bf16 would decide for whoever comes after."""
    yield
    state: Any = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
