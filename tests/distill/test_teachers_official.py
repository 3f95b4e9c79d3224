"""Teachers in DeepSeek-V4's official layout are read tensor by tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import teacher_models
from distill.causal_lm import hidden_states
from distill.teacher_models import Loader
from posttrain.backbone import V4ForCausalLM, official
from posttrain.checkpoints import load_model
from posttrain.errors import CheckpointError


@pytest.fixture
def folder(make_model: Callable[..., V4ForCausalLM], tmp_path: Path) -> Path:
    official.save(make_model(3, 40, moe_intermediate_size=32), tmp_path / "official")
    return tmp_path / "official"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_is_what_loading_it_whole_gives_to_the_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    whole: Any = load_model(folder, dtype=dtype)
    monkeypatch.setattr(teacher_models, "load_model", None)
    loader = Loader(dtype=dtype, device="cpu")
    assert loader.can_read_ahead(folder)
    weights, state = loader.read(folder), whole.state_dict()
    assert {name for name in state if name.startswith("model.")} == weights.tensors.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.tensors.items())
    assert torch.equal(loader.head(folder).weight, state["lm_head.weight"])
    model, ids = loader.assemble(weights), torch.tensor([[5, 9, 17, 30, 4]])
    with torch.no_grad():
        found = hidden_states(model, ids, torch.ones_like(ids))
        assert torch.equal(found, hidden_states(whole, ids, torch.ones_like(ids)))


def test_a_damaged_one_is_refused_by_name(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"cannot load a model from {folder}"):
        Loader(dtype=torch.float32, device="cpu").read(folder)
