"""No tensor grows with the square of a document's length, in training neither."""

from typing import Any

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


def largest(length: int, **config: Any) -> int:
    """Of a training step with the indexer's own loss."""
    model: Any = small_model(
        [SLIDING, CSA, HCA],
        sliding_window=16,
        index_topk=8,
        compress_rates={CSA: 4, HCA: 16},
        indexer_loss_weight=1.0,
        **config,
    ).train()
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        model(ids, labels=ids).loss.backward()
    indexer = [p.grad for n, p in model.named_parameters() if "indexer" in n]
    assert indexer
    assert all(gradient is not None and gradient.any() for gradient in indexer)
    return seen.numel


def test_a_training_step_makes_no_tensor_of_the_squared_length() -> None:
    small, large = largest(512), largest(2048)
    assert large <= 4.2 * small
    assert large < 2048 * 2048 // 4
