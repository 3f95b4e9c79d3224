"""No tensor grows with the square of a document's length, in training neither."""

from typing import Any

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.backbone.presets import CSA, HCA, SLIDING


class Largest(TorchDispatchMode):
    """The most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return found


def largest(length: int, *, learns: bool) -> int:
    """Of a training step with the indexer's own loss, or of reading without gradients; two
    documents of different lengths in a row."""
    model: Any = small_model(
        [SLIDING, CSA, HCA],
        sliding_window=16,
        index_topk=8,
        compress_rates={CSA: 4, HCA: 16},
        indexer_loss_weight=1.0,
    ).train(learns)
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    place = torch.arange(length)[None]
    positions = torch.where(place < length // 8, place, place - length // 8)
    with Largest() as seen, torch.set_grad_enabled(learns):
        loss = model(ids, labels=ids, position_ids=positions).loss
        if learns:
            loss.backward()
    indexer = [p.grad for n, p in model.named_parameters() if "indexer" in n]
    assert indexer
    assert all((gradient is not None and bool(gradient.any())) == learns for gradient in indexer)
    return seen.numel


@pytest.mark.parametrize("learns", [True, False])
def test_no_tensor_of_the_squared_length_is_made(*, learns: bool) -> None:
    small, large = largest(1024, learns=learns), largest(8192, learns=learns)
    assert large <= 8.5 * small
    assert large < 8192 * 8192 // 16  # less than a number for each of HCA's entries a token
