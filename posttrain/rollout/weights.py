"""A model's weights on their way from the learner to those who sample: parameters and buffers.

Buffers too, since some decide what the model says and change while it trains: the router's biases,
the table of token ids to experts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = Mapping[str, np.ndarray]
"""The bytes of each parameter and buffer by name; they travel between processes without a copy."""


def copy_weights(model: Any) -> Weights:
    """What `load_weights` puts into another model of the same config; it stays as it is while
    `model` is trained on."""
    return {
        name: tensor.detach().to("cpu", copy=True).reshape(-1).view(torch.uint8).numpy()
        for name, tensor in named_tensors(model).items()
    }


@torch.no_grad()
def load_weights(model: Any, weights: Weights) -> None:
    """Overwrite all parameters and buffers. Raises ValueError, before any is, where the names or
    sizes are another model's."""
    tensors = named_tensors(model)
    if tensors.keys() != weights.keys():
        differing = sorted(tensors.keys() ^ weights.keys())
        raise ValueError(f"the weights are another model's: {differing[0]} is in one of them only")
    for name, tensor in tensors.items():
        if tensor.nbytes != weights[name].nbytes:
            raise ValueError(
                f"the weights are another model's: {name} has {weights[name].nbytes} bytes there, "
                f"{tensor.nbytes} here"
            )
    for name, tensor in tensors.items():
        found = weights[name]
        if not found.size:
            continue
        found = torch.from_numpy(found if found.flags.writeable else found.copy())
        tensor.copy_(found.view(tensor.dtype).view(tensor.shape))


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, those that no checkpoint holds included; a shared one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
