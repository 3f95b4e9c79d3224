"""One step of a sampler: a token in every slot that has one, and a chunk of what other slots are
still to read, in one forward.

A token's hidden state does not depend, to the bit, on the tokens beside it, its slot, or whether it
came alone or in a chunk, as long as steps have a multiple of `ROWS` tokens and the cache has room
for whole blocks (`room_for`): shown on CPU (tests/backbone/test_chunks.py), where torch's products
of such shapes round each row alike. Places past a row's end are computed like tokens, which none of
its tokens sees, and leave nothing in the cache.

Legend: B slots (the first ones), D rows of a chunk, C its columns, T tokens of a step, H hidden
size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import DecodeContext, context_of
from posttrain.backbone.decode_keys import ROWS, Part
from posttrain.backbone.decode_step import step_hidden
from posttrain.backbone.routing import RouteTape


@dataclass(frozen=True)
class Chunk:
    """What rows read further: `Chunk([[5, 9, 0], [4, 0, 0]], [2, 1], [7, 3])` puts 5, 9 behind what
    slot 7 holds and 4 behind slot 3's."""

    ids_DC: Tensor
    """int64, padded at the end; C - 1 at most the cache's `num_spare`."""
    length_D: Tensor
    """Tokens of each row; 0 for one that only fills the shape. Slots of other rows differ."""
    slot_D: Tensor


def room_for(config: Any, num_tokens: int) -> int:
    """What to let a cache reserve for rows of `num_tokens`, so that every store has whole blocks of
    entries."""
    unit = ROWS * math.lcm(*config.compress_rates.values())
    return -(-num_tokens // unit) * unit


@torch.no_grad()
def step(
    model: Any,
    cache: V4Cache,
    *,
    token_B: Tensor | None = None,
    is_live_B: Tensor | None = None,
    chunk: Chunk | None = None,
    reach: int,
    tape: RouteTape | None = None,
) -> Tensor:
    """Hidden states (T, H): of the slots' tokens, then of the chunk's places, row after row.

    Args:
        model: a V4Model.
        token_B: a token for each of the first slots, of all or fewer; None: none.
        is_live_B: 0/1, the slots that advance. No slot is both live and in the chunk.
        reach: tokens that the longest row will hold, at least.
        tape: takes down the experts of the real tokens, live slots' first.

    Raises ValueError: a chunk with more columns than the cache's rings can take at once.
    """
    cache.reserve(reach)
    with torch.inference_mode():
        id_T, context = _context(model, cache, token_B, is_live_B, chunk, reach, tape)
        hidden_TH = step_hidden(model, id_T, context)
    if is_live_B is not None and token_B is not None:
        cache.advance(F.pad(is_live_B, (0, cache.num_slots - len(is_live_B))))
    if chunk is not None:
        cache.length_B = cache.length_B.index_add(0, chunk.slot_D, chunk.length_D)
    return hidden_TH.clone()


def _context(
    model: Any,
    cache: V4Cache,
    token_B: Tensor | None,
    is_live_B: Tensor | None,
    chunk: Chunk | None,
    reach: int,
    tape: RouteTape | None,
) -> tuple[Tensor, DecodeContext]:
    device, slots = cache.length_B.device, 0 if token_B is None else len(token_B)
    ids, slot, position, is_real, parts = [], [], [], [], []
    if token_B is not None and is_live_B is not None:
        ids.append(token_B)
        slot.append(torch.arange(slots, device=device))
        position.append(cache.length_B[:slots])
        is_real.append(is_live_B.bool())
        parts.append(Part(0, slots))
    if chunk is not None:
        rows, columns = chunk.ids_DC.shape
        if columns > cache.num_spare + 1:
            raise ValueError(
                f"a chunk of {columns} columns, but the cache's rings have {cache.num_spare} spare "
                f"places: make V4Cache(num_spare={columns - 1}) or the chunk shorter"
            )
        column_C = torch.arange(columns, device=device)
        ids.append(chunk.ids_DC.flatten())
        slot.append(chunk.slot_D.repeat_interleave(columns))
        position.append((cache.length_B[chunk.slot_D][:, None] + column_C).flatten())
        is_real.append((column_C < chunk.length_D[:, None]).flatten())
        parts.append(Part(slots, slots + rows * columns, chunk.slot_D))
    is_real_T = torch.cat(is_real)
    context = context_of(
        model,
        cache,
        position_T=torch.cat(position),
        parts=tuple(parts),
        slot_of_T=torch.cat(slot),
        real_X=is_real_T.nonzero().squeeze(1),
        reach=reach,
        tape=tape and tape.of_rows(is_real_T),
    )
    return torch.cat(ids), context
