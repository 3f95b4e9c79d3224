"""Several tokens of every row at one go, where nobody reads, comes or is told of each token: what a
row is asked for is looked up once, and what it got is put down once. A go ends as soon as somebody
waits for its end.

Legend: N rows, n those that have not ended, S steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from posttrain.rollout.draws import Draws
from posttrain.rollout.row import Row

STEPS = 8
"""The most that a go takes of a row."""


class Taken(NamedTuple):
    """What a row sampled."""

    tokens: list[int]
    logp: list[float]
    routes: list[Any]
    """Of the tokens fed, each (1, layers, experts a token); empty where not wanted."""


def can_go(row: Row) -> bool:
    """Whether arrays tell when the row ends, and all that is kept of its tokens."""
    request = row.request
    return not (request.stop_strings or request.wants_support or row.finish_reason)


def go_ahead(
    steps: Any,
    rows: Sequence[Row],
    write: Callable[[Sequence[int], Sequence[int], Sequence[float]], None] | None,
    is_called: Callable[[Sequence[Row]], bool],
) -> list[Taken]:
    """Up to `STEPS` tokens of each row, which is fed its last one first; until it ends.

    Args:
        steps: what `V4Slots.ahead` gave for the rows' slots.
        write: told of each step's rows (their places among `rows`), tokens and log-probabilities
            before a token is fed.
        is_called: whether it was the last step, asked after each with the rows that ended in it.
    """
    draws, num = Draws(rows), len(rows)
    wants_routes = any(row.request.wants_routes for row in rows)
    token_n = torch.tensor([row.unread[0] for row in rows])
    left_n = np.array([row.room for row in rows])
    stop_nX = _stop_ids(rows)
    at_n = np.arange(num)
    token_NS = np.zeros((num, STEPS), np.int64)
    logp_NS, count_N = np.zeros((num, STEPS)), np.zeros(num, np.int64)
    routes: list[list[Any]] = [[] for _ in rows]
    for step in range(STEPS):
        logits_XV, experts = steps.step(token_n, wants_routes=wants_routes)
        draw = draws.draw(logits_XV)
        token_n, logp_n = draw.token_B[: len(at_n)], draw.logp_B[: len(at_n)]
        if write is not None:
            write(at_n.tolist(), token_n.tolist(), logp_n.tolist())
        token_NS[at_n, step], logp_NS[at_n, step] = token_n.numpy(), logp_n.numpy()
        count_N[at_n] += 1
        for place, chosen in zip(at_n.tolist(), experts, strict=False):
            routes[place].append(chosen)
        left_n -= 1
        goes_on_n = (left_n > 0) & ~(token_n.numpy()[:, None] == stop_nX).any(axis=1)
        (kept,) = goes_on_n.nonzero()
        ended = [rows[place] for place in at_n[~goes_on_n]] if len(kept) < len(at_n) else []
        if not len(kept) or is_called(ended):
            break
        if ended:
            at_n, left_n, stop_nX, token_n = at_n[kept], left_n[kept], stop_nX[kept], token_n[kept]
            draws.keep(kept)
            steps.keep(kept)
    steps.close()
    columns = zip(token_NS.tolist(), logp_NS.tolist(), count_N.tolist(), routes, strict=True)
    return [Taken(tokens[:count], logp[:count], own) for tokens, logp, count, own in columns]


def _stop_ids(rows: Sequence[Row]) -> Any:
    """(N, the most that a row has), -1 where it has fewer."""
    width = max(len(row.request.stop_token_ids) for row in rows)
    stop_NX = np.full((len(rows), width), -1)
    for own_X, row in zip(stop_NX, rows, strict=True):
        own_X[: len(row.request.stop_token_ids)] = row.request.stop_token_ids
    return stop_NX
