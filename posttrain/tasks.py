"""A domain at work with a tokenizer: prompts to sample, tools that answer, rewards, transcripts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from posttrain.chat import (
    encode_example,
    encode_prompt,
    encode_tool_results,
    parse_tool_results,
    parse_turn,
)
from posttrain.config import Effort
from posttrain.domains import (
    DomainSpec,
    Need,
    Overlap,
    Row,
    Toolbox,
    load_sides,
    near_tests,
    overlap,
    refuse_names_of_tool_arguments,
)
from posttrain.errors import DataError, RewardError
from posttrain.judge import Case, Judge, JudgeModel, load_judge, with_verdict
from posttrain.judge_config import REWARD
from posttrain.judge_prompts import judged_field
from posttrain.rollout.types import Request, Rollout
from posttrain.transcripts import lines_of, told
from rewards.environments import replay
from rewards.grader import GradeItem, Grader
from rewards.score import RewardError as BadReward
from rewards.score import Score

Message = dict[str, Any]

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToolTurns:
    """Request.continue_turn of one row: a turn's calls -> their results and the next mark.

    A turn without a call that can be read is the last one. How many turns there are is bounded by
    the request's max_new_tokens, which counts the results too.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: Toolbox
    effort: Effort
    fields: Mapping[str, Any]

    def __call__(self, own: list[int]) -> list[int] | None:
        turn = parse_turn(self.tokenizer, own, effort=self.effort)
        if not turn.tool_calls:
            return None
        results = [
            self.tools.run(call.name, call.arguments, self.fields) for call in turn.tool_calls
        ]
        return encode_tool_results(self.tokenizer, results, effort=self.effort)


@dataclass(frozen=True)
class WorldTurns:
    """Request.continue_turn of a row with an environment: the own tokens of all turns -> the last
    turn's results. All calls are made again on a fresh environment, so that a rollout that goes on
    after a kill gets what it would have got."""

    tokenizer: PreTrainedTokenizerBase
    environment: Mapping[str, Any]
    effort: Effort

    def __call__(self, own: list[int]) -> list[int] | None:
        turns = [parse_turn(self.tokenizer, ids, effort=self.effort) for ids in self._turns(own)]
        num_calls = len(turns[-1].tool_calls)
        if not num_calls:
            return None
        calls = [{"name": c.name, "arguments": c.arguments} for t in turns for c in t.tool_calls]
        results = replay(self.environment, calls).results[-num_calls:]
        return encode_tool_results(self.tokenizer, results, effort=self.effort)

    def _turns(self, own: list[int]) -> list[list[int]]:
        """Each turn's tokens, its end included."""
        end = cast("int", self.tokenizer.eos_token_id)
        ends = [i + 1 for i, token in enumerate(own) if token == end]
        starts = [0, *ends]
        return [own[a:b] for a, b in zip(starts, [*ends, len(own)], strict=True) if a < b]


class Task:
    """A domain's rows, split, with what it takes to sample, score and show answers to them.

    The grading process starts with the first `score`, which also loads the judge, if there is one;
    `close` ends it.
    """

    def __init__(
        self,
        spec: DomainSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: Path,
        seed: int,
        need: Need | None = None,
        judge: JudgeModel | Path | None = None,
        out: Path | None = None,
    ) -> None:
        """Load the rows and the tools.

        Args:
            folder: the recipe's.
            seed: decides generated data, and what a judge says.
            need: the rows that are read of streamed data; None: all.
            judge: who judges where `spec.judge` names no folder (`posttrain.judge.stand_in`).
            out: of a stage that trains: where it tells which rows are too near to a test's.

        Raises:
            DataError, RecipeError: what is wrong with the data or a tool.
            RewardError: there is nobody to judge.
        """
        self.spec = spec
        self.name = spec.name
        self._tokenizer = tokenizer
        self._end = cast("int", tokenizer.eos_token_id)
        self._folder, self._seed = folder, seed
        self._judge_at = self._found_judge(judge)
        self._judge: Judge | None = None
        self._tools = Toolbox(spec.tools, folder)
        self._prompt_tools = spec.prompt_tools
        self.train, self.heldout = load_sides(spec, folder=folder, seed=seed, need=need)
        self.contaminated = self._contaminated(out)
        left_out = {near.row.id for near in self.contaminated}
        self.train = [row for row in self.train if row.id not in left_out]
        self._rows = {row.id: row for row in (*self.train, *self.heldout)}
        if self._tools:
            refuse_names_of_tool_arguments(self._rows.values())
        for row in self._rows.values() if spec.judge else ():  # before anything is sampled
            self._read_by_judge(row)
        self._grader: Grader | None = None

    def _contaminated(self, out: Path | None) -> list[Overlap]:
        """Rows to train on that are too near to a test's."""
        config = self.spec.decontaminate
        if config is None:
            return []
        found = near_tests(config, self.train, self.heldout, folder=self._folder, seed=self._seed)
        if out is not None:
            overlap.tell(found, out, domain=self.name, num_train=len(self.train), config=config)
        if found:
            worst = max(found, key=lambda near: near.share)
            LOGGER.warning(
                "domain %r: %d of %d prompts are too near to a test's and not trained on; nearest, "
                "by %.2f: %r and, %s, %r",
                *(self.name, len(found), len(self.train), worst.share),
                *(worst.row.messages[-1]["content"], worst.source),
                worst.other.messages[-1]["content"],
            )
        return found

    def messages(self, row: Row) -> list[Message]:
        """The row's prompt with the domain's system prompt in front."""
        system = [{"role": "system", "content": self.spec.system}] if self.spec.system else []
        return [*system, *row.messages]

    def requests(
        self,
        rows: Sequence[Row],
        *,
        sample: int = 0,
        num_samples: int = 1,
        temperature: float = 1.0,
    ) -> list[Request]:
        """Samples `sample` .. `sample + num_samples - 1` of each row, row by row."""
        return [
            Request(
                prompt_id=row.id,
                prompt=prompt,
                sample=sample + i,
                max_new_tokens=self.spec.max_new_tokens,
                temperature=temperature,
                stop_token_ids=(self._end,),
                domain=self.name,
                continue_turn=self._continue_turn(row),
                tells_all_turns=self.spec.environment is not None,
            )
            for row in rows
            for prompt in [self._prompt(row)]
            for i in range(num_samples)
        ]

    def request_of(self, rollout: Rollout, *, temperature: float) -> Request:
        """What asked for a rollout."""
        row = self._rows[rollout.prompt_id]
        (request,) = self.requests([row], sample=rollout.sample, temperature=temperature)
        return request

    def _prompt(self, row: Row) -> list[int]:
        return encode_prompt(
            self._tokenizer,
            self.messages(row),
            tools=self._prompt_tools,
            effort=self.spec.effort,
        )

    def _continue_turn(self, row: Row) -> ToolTurns | WorldTurns | None:
        if self.spec.environment is not None:
            world = self.spec.reward_fields(row.fields)["environment"]
            return WorldTurns(self._tokenizer, world, self.spec.effort)
        if self._tools:
            return ToolTurns(self._tokenizer, self._tools, self.spec.effort, row.fields)
        return None

    def demonstrations(
        self, rows: Sequence[Row], *, completion_only: bool = False
    ) -> list[tuple[list[int], list[bool]]]:
        """Each row's prompt and demonstration as (ids, is_own); own are the assistant's tokens, of
        the demonstration alone where so asked, or also of earlier turns in the prompt.

        Raises:
            DataError: if a row has no demonstration.
        """
        return [
            encode_example(
                self._tokenizer,
                [*self.messages(row), *self._demonstration(row)],
                tools=self._prompt_tools,
                effort=self.spec.effort,
                since=len(self.messages(row)) if completion_only else 0,
            )
            for row in rows
        ]

    def _demonstration(self, row: Row) -> list[Message]:
        if not row.response:
            raise DataError(
                f"domain {self.name!r}: the row with prompt {row.messages[-1]['content']!r} has no "
                "response to learn from: add one, or leave the row out of sft"
            )
        return row.response

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """The rewards of the rollouts, in order; a truncated one is graded as it is. Where nobody
        can tell, since a judge cannot be read, the reward is not a number.

        Raises:
            RewardError: a reward is unknown, or its module cannot be imported.
            CheckpointError: the judge cannot be loaded.
        """
        scores = self._graded(rollouts)
        if self.spec.judge is None:
            return scores
        if self._judge is None:
            at = self._judge_at
            model = load_judge(at) if isinstance(at, Path) else at
            assert model is not None
            self._judge = Judge(self.spec.judge, model, seed=self._seed)
        verdicts = self._judge.verdicts([self._case(r) for r in rollouts])
        weight = self.spec.reward_weights[REWARD]
        return [with_verdict(*pair, weight) for pair in zip(scores, verdicts, strict=True)]

    def _found_judge(self, given: JudgeModel | Path | None) -> JudgeModel | Path | None:
        config = self.spec.judge
        if config is None or given is not None:
            return given
        if config.folder is None:
            raise RewardError(
                f"domain {self.name!r}: its judge is {config.checkpoint!r}, and there is none "
                "here: name a checkpoint's folder in judge.checkpoint"
            )
        return self._folder / config.folder

    def _case(self, rollout: Rollout) -> Case:
        row = self._rows[rollout.prompt_id]
        rubric, reference = self._read_by_judge(row)
        return Case(
            id=f"{rollout.prompt_id}/{rollout.sample}",
            prompt=told(self.messages(row)),
            rubric=rubric,
            answer=told(self.turns(rollout)),
            reference=reference,
        )

    def _read_by_judge(self, row: Row) -> tuple[str, str | None]:
        """The row's rubric and reference. Raises DataError where it has none."""
        config, fields = self.spec.judge, self.spec.reward_fields(row.fields)
        assert config is not None
        rubric = judged_field(row, fields, config.rubric)
        return rubric, config.reference and judged_field(row, fields, config.reference)

    def _graded(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """The sums of all rewards but the judge."""
        if not self.spec.graded_rewards:
            return [Score(0.0, "")] * len(rollouts)
        try:
            if self._grader is None:
                self._grader = Grader(
                    self.spec.graded_rewards,
                    folder=self._folder,
                    timeout_s=self.spec.reward_timeout_s,
                )
            return self._grader.score([self.grade_item(rollout) for rollout in rollouts])
        except BadReward as error:
            raise RewardError(f"domain {self.name!r}: {error}") from None

    def grade_item(self, rollout: Rollout) -> GradeItem:
        """What the rewards see of a rollout: the last turn's content, the conversation, the row."""
        turns = self.turns(rollout)
        row = self._rows[rollout.prompt_id]
        content = next((m["content"] for m in reversed(turns) if m["role"] == "assistant"), "")
        messages = [*self.messages(row), *turns]
        fields = {**self.spec.reward_fields(row.fields), "messages": messages}
        return GradeItem(response=content, row=fields)

    def turns(self, rollout: Rollout) -> list[Message]:
        """The rollout's response as messages: the model's turns, the tools' results between."""
        turns: list[Message] = []
        for is_own, ids in spans(rollout):
            if is_own:
                turn = parse_turn(self._tokenizer, ids, effort=self.spec.effort)
                turns.append(turn.message())
            else:
                results = parse_tool_results(self._tokenizer, ids)
                turns += [{"role": "tool", "content": result} for result in results]
        return turns

    def render(self, rollout: Rollout) -> str:
        """A transcript, a line or more for each message, such as `user: 38+47=`."""
        messages = [*self.messages(self._rows[rollout.prompt_id]), *self.turns(rollout)]
        lines = [line for message in messages for line in lines_of(message)]
        if rollout.finish_reason == "length":
            lines.append("(cut: out of tokens)")
        return "\n".join(lines)

    @property
    def failures(self) -> dict[str, int]:
        """How often a reward failed, by kind of failure; such an answer scored 0."""
        return dict(self._grader.failures) if self._grader else {}

    @property
    def unjudged(self) -> int:
        """How many answers have no reward, since no vote of their judge could be read."""
        return self._judge.num_unjudged if self._judge else 0

    @property
    def votes(self) -> tuple[int, int]:
        """Votes that a judge has cast, and how many of them could not be read."""
        return (self._judge.num_votes, self._judge.num_unread) if self._judge else (0, 0)

    @property
    def tool_failures(self) -> dict[str, int]:
        """How often a tool raised or did not answer in time; the model was told so."""
        return dict(self._tools.failures)

    def close(self) -> None:
        """End the grading process, if one was started."""
        self._tools.close()
        if self._grader is not None:
            self._grader.close()


def heldout_rows(task: Task, num_prompts: int | None) -> list[Row]:
    """The first `num_prompts` held-out rows. Raises DataError where there is none."""
    rows = task.heldout[:num_prompts]
    if not rows:
        raise DataError(
            f"domain {task.name!r} has no held-out prompt to evaluate on (its {len(task.train)} "
            "prompts are all for training): give it more rows or raise its heldout_share"
        )
    return rows


def spans(rollout: Rollout) -> list[tuple[bool, list[int]]]:
    """The response cut where is_own changes: own spans are the model's turns."""
    found: list[tuple[bool, list[int]]] = []
    for token, is_own in zip(rollout.response, rollout.is_own, strict=True):
        if not found or found[-1][0] != is_own:
            found.append((is_own, []))
        found[-1][1].append(token)
    return found
