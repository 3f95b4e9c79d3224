"""A request on its way: what it has said, what it is still to read, and whether it has ended."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from posttrain.rollout.sampling import stream_key
from posttrain.rollout.stops import Stops
from posttrain.rollout.types import Request, Rollout, Said


class Token(NamedTuple):
    """A sampled token, as a row takes it and the journal keeps it."""

    token: int
    logp: float
    version: int
    kept_logp: float = 0.0
    support: tuple[int, ...] = ()


@dataclass
class Row:
    """A request. It reads `unread`, then takes a sampled token, feeds it, takes the next; at the
    end of a turn it may wait for what is said to it, and reads that."""

    request: Request
    key: int
    stops: Stops
    unread: list[int] = field(default_factory=list[int])
    """Tokens that the model is to be fed before the row's next token is sampled."""
    slot: int = -1
    number: int = -1
    """In the journal."""
    response: list[int] = field(default_factory=list[int])
    is_own: list[bool] = field(default_factory=list[bool])
    logp: list[float] = field(default_factory=list[float])
    versions: list[int] = field(default_factory=list[int])
    kept_logp: list[float] = field(default_factory=list[float])
    support: list[list[int]] = field(default_factory=list[list[int]])
    routes: list[Any] = field(default_factory=list[Any])
    """Experts of the tokens fed, in pieces (tokens, layers, experts a token)."""
    turn: int = 0
    """Where the current turn's own tokens start in `response`."""
    is_turn_over: bool = False
    answer: Future[Said] | None = None
    """What is being said to the turn that is over."""
    stop_string: str = ""
    finish_reason: str = ""

    @classmethod
    def of(cls, request: Request, *, seed: int, tokenizer: Any) -> Row:
        key = stream_key(seed, request.prompt_id, request.sample)
        row = cls(request, key, Stops(request.stop_strings, tokenizer), list(request.prompt))
        if request.begun is not None:
            row._go_on_from(request.begun)
        return row

    def _go_on_from(self, begun: Rollout) -> None:
        if begun.finish_reason != "paused":
            raise ValueError(
                f"the rollout of {begun.prompt_id!r}, sample {begun.sample}, has ended by "
                f"{begun.finish_reason!r}: only one that has paused goes on"
            )
        self.response, self.is_own = list(begun.response), list(begun.is_own)
        self.logp, self.versions = list(begun.logp), list(begun.token_versions)
        self.kept_logp, self.support = list(begun.kept_logp), list(begun.support)
        others = [place for place, own in enumerate(self.is_own) if not own]
        self.turn = others[-1] + 1 if others else 0
        self.unread = self.tokens

    @property
    def is_done(self) -> bool:
        """It has ended; what it may still read, a journal's, is for its routes."""
        return bool(self.finish_reason) and not self.unread

    @property
    def is_reading_prompt(self) -> bool:
        return bool(self.unread) and not self.response

    @property
    def room(self) -> int:
        """Tokens until it is cut, or pauses."""
        end = self.request.max_new_tokens
        return min(end, self.request.pause_at or end) - len(self.response)

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt, *self.response]

    @property
    def own_tokens(self) -> list[int]:
        """What is told of the turn that is over: its tokens, or those of all turns."""
        if not self.request.tells_all_turns:
            return self.response[self.turn :]
        return [t for t, mine in zip(self.response, self.is_own, strict=True) if mine]

    def take(self, token: Token) -> None:
        """The row's next token, sampled."""
        if self.request.wants_support:
            self.kept_logp.append(token.kept_logp)
            self.support.append(list(token.support))
        self.take_all([token.token], [token.logp], token.version)

    def take_all(self, tokens: list[int], logp: list[float], version: int) -> None:
        """Its next ones, none but the last of which may end a turn; that is to be fed, unless the
        row ends with it; with all before it, where that is to be read again."""
        self._extend(tokens, logp, version, is_own=True)
        self.unread = self.tokens if self.unread else tokens[-1:]
        self.stop_string = self.stops.completed(self.response, self.turn)
        self.is_turn_over = bool(self.stop_string) or tokens[-1] in self.request.stop_token_ids
        if self.is_turn_over and self.request.continue_turn is None:
            self.finish_reason = "stop"
        elif not self.is_turn_over:
            self._end_if_full()
        if self.finish_reason:
            self.unread, self.is_turn_over = [], False

    def _end_if_full(self) -> None:
        if self.room <= 0:
            is_cut = len(self.response) >= self.request.max_new_tokens
            self.finish_reason = "length" if is_cut else "paused"

    def hear(self, said: Said, version: int) -> None:
        """What is said to the turn; the row ends where that is nothing, or leaves no room for a
        further token."""
        self.answer, self.is_turn_over = None, False
        if said is None or len(self.response) + len(said) >= self.request.max_new_tokens:
            self.finish_reason, self.unread = "stop" if said is None else "length", []
            return
        self._extend(said, [0.0] * len(said), version, is_own=False)
        if self.request.wants_support:
            self.kept_logp += [0.0] * len(said)
            self.support += [[] for _ in said]
        self.unread += said
        self.turn, self.stop_string = len(self.response), ""
        self._end_if_full()
        if self.finish_reason:
            self.unread = []

    def _extend(self, tokens: list[int], logp: list[float], version: int, *, is_own: bool) -> None:
        self.response += tokens
        self.is_own += [is_own] * len(tokens)
        self.logp += logp
        self.versions += [version] * len(tokens)

    def rollout(self) -> Rollout:
        request, routes = self.request, None
        if request.wants_routes:
            fed = np.concatenate(self.routes) if self.routes else np.zeros((0, 0, 0), np.int16)
            missing = len(self.tokens) - len(fed)
            routes = np.pad(fed, ((0, missing), (0, 0), (0, 0)), constant_values=-1)
        return Rollout(
            prompt_id=request.prompt_id,
            domain=request.domain,
            version=self.versions[0],
            prompt=request.prompt,
            response=self.response,
            is_own=self.is_own,
            logp=self.logp,
            sample=request.sample,
            finish_reason=self.finish_reason,
            versions=self.versions if len(set(self.versions)) > 1 else [],
            stop_string=self.stop_string,
            kept_logp=self.kept_logp,
            support=self.support,
            routes=routes,
        )
