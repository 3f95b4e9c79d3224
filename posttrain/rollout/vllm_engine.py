"""The same engine with vLLM inside, for clusters of GPUs: optional, and tried on CPU alone.

vLLM decodes and samples; rows, stops, turns, the journal and versions are ours. Weights go to it as
a checkpoint in a temporary folder of this machine, where its workers are, at the beginning of each
run and in `update`.

What it does not keep of the engine's laws: its bits depend on the rows beside each other, as its
kernels' do, so that no token repeats for certain; a killed run goes on from its journal with other
tokens than it would have had. It reports neither experts nor log-probabilities before top-p and
top-k, so requests for these are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

from posttrain.rollout.batch import Peekable
from posttrain.rollout.engine import Engine
from posttrain.rollout.row import Row, Token
from posttrain.rollout.sampling import stream_key
from posttrain.rollout.types import Request, Rollout


class VllmEngine(Engine):
    """Samples from `model`, a causal model of transformers' that vLLM knows, too.

    Weights are `model`'s at the beginning of each run. `close` ends vLLM's processes.
    """

    def __init__(
        self, model: Any, *, options: Mapping[str, Any] | None = None, **as_engine: Any
    ) -> None:
        """
        Args:
            options: more arguments of `vllm.LLM`, such as `tensor_parallel_size`.
            as_engine: arguments of `Engine`.

        Raises ImportError: vLLM is not installed.
        """
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "the backend 'vllm' needs the package vllm on the machines that sample: install it "
                "there, or use the backend 'engine'"
            ) from error
        super().__init__(model, **as_engine)
        self._vllm, self._options = vllm, dict(options or {})
        self._folder = TemporaryDirectory(prefix="posttrain-vllm-")
        self._llm: Any = None
        self._live: dict[str, Row] = {}
        """By vLLM's name of a request that goes on."""
        self._asked: list[Row] = []
        self._names = count()

    def _sampled(self, requests: Iterable[Request]) -> Iterator[Rollout]:
        """Raises ValueError: a request asks for what vLLM does not report."""
        self._load()
        waiting = Peekable(self._row(checked(request)) for request in requests)
        try:
            while self._live or self._asked or waiting.peek() is not None:
                with self._handover.step():
                    ended = self._admit(waiting) + self._stepped() + self._answered()
                yield from [row.rollout() for row in ended]
        finally:
            self._llm.llm_engine.abort_request(list(self._live))
            self._live, self._asked = {}, []

    def _change_weights(self, *, rereads: bool) -> None:
        """Rows read again what they have, whether `rereads` or not: what vLLM caches of a prompt is
        shared by rows to come."""
        self._load()

    def close(self) -> None:
        """End vLLM; what it was given is deleted."""
        self._llm = None
        self._folder.cleanup()

    def _load(self) -> None:
        """The model's weights of now into vLLM."""
        self.model.save_pretrained(self._folder.name)
        if self._llm is None:
            self._llm = self._vllm.LLM(
                **{
                    "model": self._folder.name,
                    "skip_tokenizer_init": True,
                    "dtype": str(self.model.dtype).removeprefix("torch."),
                    "logprobs_mode": "processed_logprobs",
                    "max_num_seqs": self.num_slots,
                    "disable_log_stats": True,
                    **self._options,
                }
            )
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": self._folder.name})
        self._llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    def _admit(self, waiting: Peekable) -> list[Row]:
        """Fill the free slots. Gives out rows that had ended before."""
        ended: list[Row] = []
        while len(self._live) + len(self._asked) < self.num_slots:
            row = waiting.peek()
            if row is None:
                break
            waiting.take()
            if row.is_done:
                ended.append(row)
            elif row.is_turn_over:
                self._asked.append(row)
            else:
                self._submit(row)
        return ended

    def _submit(self, row: Row) -> None:
        """Let vLLM go on with what the row has. The seed is another for each turn: vLLM counts from
        where it is given one."""
        request, place = row.request, len(row.response)
        kinds = self._vllm.sampling_params.RequestOutputKind
        params = self._vllm.SamplingParams(
            max_tokens=row.room,
            temperature=request.temperature,
            seed=stream_key(row.key, str(place), 0) >> 1,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,  # the request says what ends a turn
            logprobs=0,
            detokenize=False,
            output_kind=kinds.DELTA,
        )
        name = str(next(self._names))
        self._live[name] = row
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": row.tokens}, params)

    def _stepped(self) -> list[Row]:
        """One step of vLLM's; the rows that ended with it."""
        if not self._live:
            return []
        ended: list[Row] = []
        for output in self._llm.llm_engine.step():
            row = self._live.get(output.request_id)
            if row is None:  # aborted while a step of it was under way
                continue
            (said,) = output.outputs
            logps = [
                found[t].logprob for t, found in zip(said.token_ids, said.logprobs, strict=True)
            ]
            for token, logp in zip(said.token_ids, logps, strict=True):
                self._take_one(row, Token(token, logp, self.version))
                if row.is_done or row.is_turn_over:
                    break
            if output.finished and not (row.is_done or row.is_turn_over):
                row.finish_reason, row.unread = "length", []  # the model's context is full
            if not (row.is_done or row.is_turn_over):
                continue
            del self._live[output.request_id]
            if not output.finished:  # a stop string, which vLLM was not told of
                self._llm.llm_engine.abort_request([output.request_id])
            (ended if row.is_done else self._asked).append(row)
        return ended

    def _take_one(self, row: Row, token: Token) -> None:
        if self.journal is not None:
            self.journal.tokens([(row, token)])
        row.take(token)
        if row.is_turn_over:
            self._ask(row)
        if self._on_token is not None:
            self._on_token(row.request, row.response)

    def _answered(self) -> list[Row]:
        """Take up rows that have been answered, and wait for one where nothing else goes on; those
        that ended with it."""
        answers = [row.answer for row in self._asked if row.answer is not None]
        if answers and not self._live:
            wait(answers, return_when=FIRST_COMPLETED)
        ready = [row for row in self._asked if row.answer is not None and row.answer.done()]
        self._asked = [row for row in self._asked if not any(row is other for other in ready)]
        self._hear(ready)
        for row in ready:
            if not row.is_done:
                self._submit(row)
        return [row for row in ready if row.is_done]


def checked(request: Request) -> Request:
    """The request. Raises ValueError: vLLM does not report what it asks for."""
    for name, default in (("top_p", 1.0), ("top_k", 0), ("wants_support", False)):
        if getattr(request, name) != default:
            raise ValueError(
                f"request {request.prompt_id!r} has {name} {getattr(request, name)}: vLLM does not "
                "tell log-probabilities before and after top-p and top-k; use the backend 'engine'"
            )
    if request.wants_routes:
        raise ValueError(
            f"request {request.prompt_id!r} wants routes, which vLLM does not report: use the "
            "backend 'engine'"
        )
    return request
