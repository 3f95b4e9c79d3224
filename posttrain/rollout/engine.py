"""The rollout engine: continuous batching in slots; a finished row's slot goes to the next prompt.

One engine for GRPO, OPD and evaluation. Each step feeds a token to every row that decodes and a
chunk of tokens to rows that read (a prompt, or what a tool said), in one forward. A row's tokens
and log-probabilities depend on (seed, prompt id, sample), its prompt and the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from posttrain.backbone import V4ForCausalLM
from posttrain.rollout.ahead import STEPS, can_go, go_ahead
from posttrain.rollout.batch import Batch
from posttrain.rollout.draws import Draws
from posttrain.rollout.generic import GenericSlots
from posttrain.rollout.handover import Handover
from posttrain.rollout.journal import Journal, fingerprint
from posttrain.rollout.row import Row, Token
from posttrain.rollout.sampling import Draw
from posttrain.rollout.slots import COLUMNS, V4Slots
from posttrain.rollout.types import Request, Rollout, Said

READERS = 128
"""Rows of a chunk, at most: a step has so many times `COLUMNS` tokens beside those that decode."""


class Engine:
    """Samples from `model`, a V4 or another causal model of transformers', in `num_slots` slots.

    `version` is stamped on every token: set it when the weights change between two runs, and call
    `update` where they change within one. `journal` may be another in every run.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        seed: int,
        journal: Journal | None = None,
        tokenizer: Any = None,
        num_tool_threads: int = 0,
        on_token: Callable[[Request, list[int]], None] | None = None,
    ) -> None:
        """
        Args:
            journal: where every token is written before it is used; a run goes on with what it has.
            tokenizer: for requests with stop strings.
            num_tool_threads: `continue_turn` is called in so many threads, while other rows go on;
                0: in place.
            on_token: told of a request's response so far, whenever it has sampled one more.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}: an engine needs at least one slot")
        self.model, self.num_slots, self.seed = model, num_slots, seed
        self.version = 0
        self.journal, self._tokenizer, self._on_token = journal, tokenizer, on_token
        self._num_tool_threads, self._pool = num_tool_threads, None
        self._is_running = False
        self._batch: Batch | None = None
        self._handover = Handover()

    @torch.no_grad()
    def run(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """Rollouts as they finish, in any order; takes requests as slots become free.

        Raises JournalError: the journal is of another run. RuntimeError: a run is going on.
        """
        if self._is_running:
            raise RuntimeError("this engine's last run is not over: exhaust or close() it first")
        if self.journal is not None:
            weights = fingerprint(self.model)
            self.journal.begin(seed=self.seed, version=self.version, weights=weights)
        was_training = self.model.training
        self.model.eval()
        try:
            self._is_running = True
            if self._num_tool_threads:
                self._pool = ThreadPoolExecutor(self._num_tool_threads, "tool")
            yield from self._sampled(requests)
        finally:
            self._is_running = False
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None
            self.model.train(was_training)

    def _sampled(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """The rollouts of a run that has begun."""
        make = V4Slots if isinstance(self.model, V4ForCausalLM) else GenericSlots
        self._slots = make(self.model, self.num_slots)
        self._batch = batch = Batch(self._slots, self.num_slots, map(self._row, requests))
        try:
            while not batch.is_empty:
                yield from [row.rollout() for row in self.step()]
        finally:
            self._batch = None

    def step(self) -> list[Row]:
        """Feed every row in a slot, sample where a token is due; the rows that ended."""
        with self._handover.step():
            batch = self._batch
            assert batch is not None, "step() is a part of run()"
            ended = batch.admit()
            live, reading = batch.due(COLUMNS, READERS)
            steps = self._steps(live)
            if steps is not None:
                rows = self._go_ahead(steps, [batch.rows[slot] for slot in sorted(live)])
            else:
                logits, routes = self._feed(live, reading)
                rows, logits = batch.fed(live, reading, logits, routes)
                if logits is not None and rows:
                    self._take(rows, Draws(rows).draw(logits))
            heard = batch.answered()
            self._hear(heard)
            is_idle = not (rows or reading or ended or heard)
            ended += batch.ended()
        if is_idle:  # others may come in meanwhile
            batch.wait_for_answer()
        return ended

    def _steps(self, live: Mapping[int, int]) -> Any:
        """Several at one go, where every row that is not asking is fed a token and they come to the
        same as one by one; else None."""
        rows = [row for row in self._rows() if not row.is_turn_over]
        if self._on_token is not None or not rows or len(live) < len(rows):
            return None
        return self._slots.ahead(sorted(live), STEPS) if all(map(can_go, rows)) else None

    def _go_ahead(self, steps: Any, rows: list[Row]) -> list[Row]:
        """Let the rows, in the order of their slots, have what `steps` come to."""
        journal, version = self.journal, self.version  # a tool that is asked may change it

        def write(places: Sequence[int], tokens: Sequence[int], logp: Sequence[float]) -> None:
            assert journal is not None
            taken = [Token(token, p, version) for token, p in zip(tokens, logp, strict=True)]
            journal.tokens(list(zip([rows[place] for place in places], taken, strict=True)))

        taken = go_ahead(steps, rows, None if journal is None else write, self._is_called)
        for row, (_, _, routes) in zip(rows, taken, strict=True):
            row.unread = []
            row.routes += routes if row.request.wants_routes else ()
        for row, (tokens, logp, _) in zip(rows, taken, strict=True):
            row.take_all(tokens, logp, version)
            if row.is_turn_over:
                self._ask(row)
        return rows

    def _is_called(self, ended: Sequence[Row]) -> bool:
        """Whether somebody waits for the next step: a request for the slot of a row that ended, a
        tool for its turn, a row for what was said to it, other weights."""
        batch = self._batch
        assert batch is not None
        if ended and (batch.has_waiting or any(row.request.continue_turn for row in ended)):
            return True
        return self._handover.num_waiting > 0 or bool(batch.answered())

    def update(
        self, version: int, apply: Callable[[], object] | None = None, *, rereads: bool = False
    ) -> None:
        """Other weights, from the next token on; may be called within a run, from any thread.

        Args:
            version: stamped on the tokens that follow.
            apply: puts the weights into `model`, between two steps.
            rereads: all rows read what they have again, so that nothing of the old weights is left;
                else what the cache holds of a row's past stays as the old weights made it.
        """
        with self._handover.between():
            if apply is not None:
                apply()
            self.version = version
            if self._is_running:
                self._change_weights(rereads=rereads)
                if self.journal is not None:
                    self.journal.updated(version=version, weights=fingerprint(self.model))

    def _change_weights(self, *, rereads: bool) -> None:
        """The model's weights have changed within a run."""
        if self._batch is not None:
            self._batch.forget_weights(rereads=rereads)

    def _row(self, request: Request) -> Row:
        row = Row.of(request, seed=self.seed, tokenizer=self._tokenizer)
        if self.journal is not None:
            self.journal.admit(row, self.version)
        if row.is_turn_over:
            self._ask(row)
        return row

    def _feed(
        self, live: dict[int, int], reading: list[tuple[Row, int]]
    ) -> tuple[Tensor | None, list[Any]]:
        """The logits after what each slot is fed; None where none is fed."""
        if not live and not reading:
            return None, []
        wants_routes = any(row.request.wants_routes for row in self._rows())
        parts = [(row.slot, row.unread[:count]) for row, count in reading]
        return self._slots.step(live, parts, wants_routes=wants_routes)

    def _take(self, rows: list[Row], draw: Draw) -> None:
        """Write the rows' tokens down, then hand them out."""
        columns = (draw.token_B.tolist(), draw.logp_B.tolist(), draw.kept_logp_B.tolist())
        tokens = [
            Token(token, logp, self.version, kept, _support(draw, i) if wants else ())
            for i, (token, logp, kept, wants) in enumerate(
                zip(*columns, [row.request.wants_support for row in rows], strict=False)
            )
        ]
        taken = list(zip(rows, tokens, strict=True))
        if self.journal is not None:
            self.journal.tokens(taken)
        for row, token in taken:
            row.take(token)
            if row.is_turn_over:
                self._ask(row)
            if self._on_token is not None:
                self._on_token(row.request, row.response)

    def _ask(self, row: Row) -> None:
        """Let what is said to the row's turn be found out."""
        ask, turn = row.request.continue_turn, row.own_tokens
        assert ask is not None
        said = ask(turn) if self._pool is None else self._pool.submit(_resolved, ask, turn)
        if not isinstance(said, Future):
            done: Future[Said] = Future()
            done.set_result(said)
            said = done
        row.answer = said

    def _hear(self, rows: list[Row]) -> None:
        for row in rows:
            assert row.answer is not None
            said = row.answer.result()
            if self.journal is not None:
                self.journal.said(row, said)
            row.hear(said, self.version)

    def _rows(self) -> Iterable[Row]:
        return self._batch.rows.values() if self._batch is not None else ()


def _resolved(ask: Callable[[list[int]], Said | Future[Said]], turn: list[int]) -> Said:
    said = ask(turn)
    return said.result() if isinstance(said, Future) else said


def _support(draw: Draw, row: int) -> tuple[int, ...]:
    if draw.keep_BV is None or bool(draw.keep_BV[row].all()):
        return ()
    return tuple(draw.keep_BV[row].nonzero().flatten().tolist())
