"""The judge at work: what it is asked about each answer, what it says, and what that is worth.

    verdict = mean over the votes that can be read; none can: no reward, which is counted
    a vote on a pair = mean of both orders, of which both must be readable

It samples through the engine, all votes of a call as one batch: each depends on (seed, case, vote),
the question and the weights alone. What is judged is data: its control tokens are mere characters,
and a verdict is read from what the judge itself wrote.

It stands here, below GRPO and evaluation, because both score answers through a task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from weakref import WeakValueDictionary

import torch

from posttrain.chat import encode_prompt, parse_turn
from posttrain.checkpoints import load_model, load_tokenizer
from posttrain.judge_config import ACTOR, REWARD, JudgeConfig
from posttrain.judge_prompts import judge_messages
from posttrain.rollout.engine import Engine
from posttrain.rollout.types import Request, Rollout
from rewards.score import Score, shown
from rewards.verdicts import read_better, read_score

LOGGER = logging.getLogger(__name__)

MAX_SHOWN = 200
"""Characters of what the judge wrote, in a reason."""


@dataclass(frozen=True)
class JudgeModel:
    """A model that judges, with its own tokenizer."""

    model: Any
    tokenizer: Any
    new_engine: Callable[..., Engine] = Engine
    """Makes the engine that samples from `model`."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to judge: `Case("3f2a/7", "Say hello.", "It greets.", "Hello!")`."""

    id: str
    """Seeds the verdict: of its prompt and sample."""
    prompt: str
    rubric: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """`Verdict(0.67, "2 of 3 votes: ...")`."""

    value: float | None
    """From 0 to 1; None: no vote could be read."""
    reason: str


class Judge:
    """Judges the answers of one domain."""

    def __init__(self, config: JudgeConfig, judge: JudgeModel, *, seed: int) -> None:
        self._config, self._judge, self._seed = config, judge, seed
        text_config = judge.model.config.get_text_config()
        self._context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.num_votes = 0
        self.num_unread = 0
        """Votes that could not be read."""
        self.num_unjudged = 0
        """Answers without a vote that could be read."""

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        """One for each case, in their order. The model's weights are taken as they are now.

        Raises ValueError: two cases have one id, which their verdicts are drawn by.
        """
        if len({case.id for case in cases}) < len(cases):
            raise ValueError("two cases to judge have one id: give their answers sample numbers")
        requests = [request for case in cases for request in self._requests(case)]
        # an engine of each call: its cache is not kept while the actor trains
        make, model = self._judge.new_engine, self._judge.model
        engine = make(model, num_slots=self._config.num_slots, seed=self._seed)
        fitting = [request for request in requests if self._fits(request)]
        said = {(r.prompt_id, r.sample): self._content(r) for r in engine.run(fitting)}
        found = [self._verdict(case, said) for case in cases]
        if found and all(verdict.value is None for verdict in found):
            LOGGER.warning(
                "nothing could be judged, of %d answers: %s", len(found), found[0].reason
            )
        return found

    def _requests(self, case: Case) -> list[Request]:
        config = self._config
        return [
            Request(
                prompt_id=_prompt_id(case, order),
                prompt=prompt,
                sample=vote,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                stop_token_ids=(self._judge.tokenizer.eos_token_id,),
            )
            for order in self._orders
            for prompt in [self._prompt(case, order)]
            for vote in range(config.votes)
        ]

    @property
    def _orders(self) -> range:
        return range(2 if self._config.pairs else 1)

    def _prompt(self, case: Case, order: int) -> list[int]:
        answers, reference = [case.answer], case.reference
        if self._config.pairs:
            answers, reference = [case.answer, str(case.reference)], None
        messages = judge_messages(
            self._config,
            prompt=case.prompt,
            rubric=case.rubric,
            answers=answers[::-1] if order else answers,
            reference=reference,
        )
        return encode_prompt(self._judge.tokenizer, messages, effort=self._config.effort)

    def _fits(self, request: Request) -> bool:
        length = len(request.prompt) + request.max_new_tokens
        return self._context is None or length <= self._context

    def _content(self, rollout: Rollout) -> str | None:
        """What the judge says, without what it thinks; None where its turn is not whole: `Score: 1`
        may have been to become `Score: 10`."""
        effort = self._config.effort
        turn = parse_turn(self._judge.tokenizer, rollout.response, effort=effort)
        return None if turn.problem or turn.tool_calls else turn.content

    def _verdict(self, case: Case, said: Mapping[tuple[str, int], str | None]) -> Verdict:
        heard = [
            [said.get((_prompt_id(case, order), vote)) for order in self._orders]
            for vote in range(self._config.votes)
        ]
        found = [worth(texts, self._config) for texts in heard]
        votes = [vote for vote in found if vote is not None]
        self.num_votes += len(found)
        self.num_unread += len(found) - len(votes)
        self.num_unjudged += not votes
        first = heard[0][0]
        words = "nothing that ends" if first is None else shown(first, limit=MAX_SHOWN)
        reason = f"{len(votes)} of {len(found)} votes read; the judge says {words}"
        return Verdict(fmean(votes) if votes else None, reason)


def worth(texts: Sequence[str | None], config: JudgeConfig) -> float | None:
    """One vote on an answer, 0 to 1, from what the judge said: of a pair in both orders, the answer
    as A and as B. None: it cannot be read."""
    if any(text is None for text in texts):
        return None
    if not config.pairs:
        return read_score(str(texts[0]), low=config.low, high=config.high)
    as_a, as_b = (read_better(str(text)) for text in texts)
    return None if as_a is None or as_b is None else (as_a + 1 - as_b) / 2


def _prompt_id(case: Case, order: int) -> str:
    return f"judge/{case.id}/{order}"


def with_verdict(graded: Score, verdict: Verdict, weight: float) -> Score:
    """The sum of what was graded and what was judged; not a number where that is unknown. An answer
    that failed to be graded stays at its 0."""
    if graded.reason and not graded.terms:
        return graded
    reason = "; ".join(filter(None, [graded.reason, f"{REWARD}: {verdict.reason}"]))
    if verdict.value is None:
        return Score(math.nan, reason, graded.terms)
    terms = {**graded.terms, REWARD: verdict.value}
    return Score(graded.reward + weight * verdict.value, reason, terms)


def stand_in(
    config: JudgeConfig | None,
    inputs: Mapping[str, Path],
    *,
    domain: str,
    actor: JudgeModel | None = None,
) -> JudgeModel | Path | None:
    """Who judges a domain where the recipe names no folder: the checkpoint of the stage that is the
    input `judge/<domain>`, or the actor. None: its judge lies in a folder, or there is none."""
    if config is None or config.folder:
        return None
    if config.checkpoint == ACTOR and actor is not None:
        return actor
    stage = inputs.get(f"judge/{domain}")
    return stage and stage / "checkpoint"


_loaded: WeakValueDictionary[str, JudgeModel] = WeakValueDictionary()


def load_judge(folder: Path) -> JudgeModel:
    """The checkpoint in a folder, on a GPU where there is one; once for all who use it at a time.

    Raises CheckpointError.
    """
    name = str(folder.resolve())
    judge = _loaded.get(name)
    if judge is None:
        model: Any = load_model(folder)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        judge = _loaded[name] = JudgeModel(model, load_tokenizer(folder))
    return judge
