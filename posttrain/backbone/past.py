"""New tokens after those that a cache holds: what they need of it, and what they leave in it.

Rings hold token p at p % ring, so a row's last tokens are read in order from wherever they stand.

Legend: D documents, L new tokens, N tokens before them that are read, R ring, X channels, E new
entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.backbone.cache import CompressedStore


def before(ring_BRX: Tensor, slots: Tensor, start_D: Tensor, count: int) -> Tensor:
    """The last `count` tokens of each slot, oldest first, (D, count, X); undefined before the
    first token."""
    step_N = torch.arange(count, device=slots.device) - count
    place_DN = (start_D[:, None] + step_N) % ring_BRX.shape[1]
    return ring_BRX[slots[:, None], place_DN]


def keep(ring_BRX: Tensor, slots: Tensor, x_DLX: Tensor, start_D: Tensor, length_D: Tensor) -> None:
    """Put the new tokens that are among each row's last R into the ring."""
    ring = ring_BRX.shape[1]
    last_D1 = (start_D + length_D)[:, None] - 1
    token_DR = last_D1 - (last_D1 - torch.arange(ring, device=slots.device)) % ring
    new_DR = token_DR - start_D[:, None]
    taken = x_DLX.gather(1, new_DR.clamp(min=0).unsqueeze(-1).expand(-1, -1, x_DLX.shape[-1]))
    is_new = (new_DR >= 0).unsqueeze(-1)
    ring_BRX[slots] = torch.where(is_new, taken.to(ring_BRX.dtype), ring_BRX[slots])


def keep_entries(
    store: CompressedStore, slots: Tensor, entry_DEC: Tensor, start_D: Tensor, length_D: Tensor
) -> None:
    """Put the entries that the new tokens complete behind each row's."""
    first_D = start_D // store.rate
    count_D = (start_D + length_D) // store.rate - first_D
    row_X, new_X = (
        (torch.arange(entry_DEC.shape[1], device=slots.device) < count_D[:, None])
        .nonzero()
        .unbind(-1)
    )
    entry = entry_DEC[row_X, new_X].to(store.entry_BEC.dtype)
    store.entry_BEC[slots[row_X], first_D[row_X] + new_X] = entry


def most_new_entries(start_D: Tensor, length_D: Tensor, rate: int) -> int:
    """The most entries that any row completes."""
    count_D = (start_D + length_D) // rate - start_D // rate
    return int(count_D.max()) if len(count_D) else 0
