"""Seeded sampling: a token depends on its logits and on (run seed, prompt id, sample, position),
nothing else.

Each row draws one uniform number a position from its own counter-based stream and inverts the
cumulative distribution, so the rows beside it, their order and restarts cannot change what it
samples.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.backbone.host import use_host_loops


class Draw(NamedTuple):
    """What rows sampled."""

    token_B: Tensor
    logp_B: Tensor
    """float64, tempered, before top-p and top-k; greedy rows': at temperature 1."""
    kept_logp_B: Tensor
    """float64, tempered, after top-p and top-k."""
    keep_BV: Tensor | None
    """What top-p and top-k leave; None: all, everywhere."""


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key of one rollout's stream."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{sample}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def uniform(key_B: NDArray[np.uint64], position_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits: splitmix64 of each key's counter at `position`."""
    x = key_B + (position_B + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) >> np.uint64(11)
    return x.astype(np.float64) * 2.0**-53


def sample(
    logits_BV: Tensor,
    uniform_B: Tensor,
    *,
    temperature_B: Tensor | None = None,
    top_p_B: Tensor | None = None,
    top_k_B: Tensor | None = None,
) -> Draw:
    """One token a row; None: 1, 1 and 0 in every row. Temperature 0 is greedy: the lowest of the
    best tokens."""
    is_whole_B = _is_whole(top_p_B, top_k_B)
    drawn = None
    if use_host_loops(logits_BV) and (is_whole_B is None or bool(is_whole_B.any())):
        from posttrain.backbone.host.draw import draw  # imports numba

        drawn = draw(logits_BV, uniform_B, temperature_B)
        if is_whole_B is None:
            return Draw(*drawn, drawn[1], None)
    tempered = logits_BV.double()
    if temperature_B is not None:
        tempered = tempered / torch.where(temperature_B == 0, 1.0, temperature_B)[:, None]
    p_BV = whole_BV = tempered.softmax(dim=-1)
    keep_BV = None
    if is_whole_B is not None:
        keep_BV = _support(p_BV, top_p_B, top_k_B)
        p_BV = p_BV * keep_BV
    total_BV = p_BV.cumsum(dim=-1)
    mass_B1 = total_BV[:, -1:]
    token_B1 = torch.searchsorted(total_BV, uniform_B[:, None] * mass_B1, right=True)
    token_B1 = token_B1.clamp(max=p_BV.shape[1] - 1)
    if temperature_B is not None:
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        token_B1 = torch.where(temperature_B[:, None] == 0, best_B1, token_B1)
    token_B, logp_B = token_B1.squeeze(1), whole_BV.gather(1, token_B1).squeeze(1).log()
    if keep_BV is None or is_whole_B is None:
        return Draw(token_B, logp_B, logp_B, None)
    if drawn is not None:  # a row that is not to be cut draws as beside others of its kind
        token_B = torch.where(is_whole_B, drawn[0], token_B)
        logp_B = torch.where(is_whole_B, drawn[1], logp_B)
    is_cut_B = ~keep_BV.all(dim=-1)
    kept_logp_B = torch.where(is_cut_B, logp_B - mass_B1.squeeze(1).log(), logp_B)
    return Draw(token_B, logp_B, kept_logp_B, keep_BV)


def _is_whole(top_p_B: Tensor | None, top_k_B: Tensor | None) -> Tensor | None:
    """Rows that ask for no cut; None: all."""
    parts = [top_p_B >= 1] if top_p_B is not None else []
    parts += [top_k_B == 0] if top_k_B is not None else []
    return torch.stack(parts).all(dim=0) if parts else None


def _support(p_BV: Tensor, top_p_B: Tensor | None, top_k_B: Tensor | None) -> Tensor:
    """True for the `top_k` likeliest tokens (0: all) that are in the smallest set of mass
    `top_p`."""
    order = p_BV.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(p_BV, dtype=torch.bool)
    if top_k_B is not None:
        k_B1 = torch.where(top_k_B > 0, top_k_B, p_BV.shape[1])[:, None]
        keep &= torch.arange(p_BV.shape[1], device=p_BV.device) < k_B1
    if top_p_B is not None:
        mass_before = order.values.cumsum(dim=-1) - order.values
        keep &= (mass_before < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
        keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, order.indices, keep)
