"""Do a recipe's graders tell right from wrong? Every row's gold answer is graded, and answers that
are wrong on purpose: silence, "I do not know.", and another row's gold.

A row's gold is its demonstration; without one, what its fields say: `answer`, for tools the
calls of `calls`, `solution` or `call`, for a judge the `gold_verdict`. A row without gold is graded
on silence alone, so that what cannot be graded at all is found too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from posttrain.domains import Row, rows_to_check
from posttrain.errors import DataError
from posttrain.judge_config import REWARD as JUDGE
from posttrain.pipeline.recipe import DomainConfig
from posttrain.pipeline.recipe_file import RecipeFile
from posttrain.pipeline.words import shown
from rewards.grader import GradeItem, Grader
from rewards.puzzles import best_constant
from rewards.registry import REWARDS
from rewards.score import RewardError, Score
from rewards.verdicts import verdict_line

Message = dict[str, Any]
Turns = list[Message]

ANSWERED = ("exact", "mathematics", "puzzles", "tools")
"""Rewards whose gold is a row's `answer` where there is no demonstration."""

SHARED = ("formats", "instructions")
"""Rewards that another row's gold may well satisfy."""

FIXED = ("", "I do not know.")
"""Answers that are wrong whatever is asked."""

MAX_SHARED = 0.02
"""Of the wrong answers, how many may be right after all: two rows may ask for the same thing in
other words."""

NUM_TRIED = 20
"""Rows behind one among which another answer is looked for."""

TOLD_EVERY = 64
"""Answers after which it is told how many are graded."""

NUM_EXAMPLES = 3
"""Problems of each kind that are told one by one."""


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to grade: to the row at place `number`."""

    number: int
    row: Row
    turns: Turns


@dataclass
class GoldFacts:
    """One reward of one domain: how its graders do on answers whose worth is known."""

    domain: str
    reward: str
    num_rows: int
    num_gold: int = 0
    """Rows that have a gold answer."""
    num_right: int = 0
    """Of them, those whose gold answer scores 1."""
    num_wrong: int = 0
    """Wrong answers that were graded."""
    num_fooled: int = 0
    """Of them, those that score no less than a gold answer."""
    best_constant: float | None = None
    """What the most frequent gold would score on all rows; None without."""
    sandbox: str | None = None
    """The level at which programs ran; None where none did."""
    num_bad: int = 0
    """Rows with a problem; those that the domain's `bad_gold` knows of included."""
    unchecked: str = ""
    """Why nothing was graded: it gives gold no 1 that is known of."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list[str])
    known: list[str] = field(default_factory=list[str])
    """What would be problems, if `bad_gold` did not let it through."""


@dataclass(frozen=True)
class GoldReport:
    """All rewards of a recipe."""

    facts: list[GoldFacts]

    @property
    def problems(self) -> list[str]:
        return [problem for fact in self.facts for problem in fact.problems]

    def json(self) -> list[dict[str, Any]]:
        """The same facts for machines."""
        return [asdict(fact) for fact in self.facts]

    def text(self) -> str:
        """The same facts to read."""
        lines = [line_of(fact) for fact in self.facts]
        return "\n".join([*lines, *(f"  PROBLEM  {problem}" for problem in self.problems)])

    def raise_problems(self) -> None:
        """Raise DataError where there are any."""
        bad = next((fact for fact in self.facts if fact.problems), None)
        if bad is not None:
            more = len(self.problems) - 1
            raise DataError(
                f"{self.problems[0]}{f'; and {more} more' if more else ''}: mend the rows or the "
                f"reward (posttrain doctor tells all), or let {bad.num_bad} bad rows of the "
                f"domain's through by domains.{bad.domain}.bad_gold: {bad.num_bad}"
            )


def check_gold(file: RecipeFile) -> GoldReport:
    """Grade what is known to be right and wrong in every domain of a recipe.

    Raises:
        DataError, RecipeError: the rows cannot be read, or a reward cannot be loaded.
    """
    seed = file.recipe.seed
    domains = file.recipe.domains.items()
    found = [check_domain(n, domain, folder=file.folder, seed=seed) for n, domain in domains]
    return GoldReport([facts for of_domain in found for facts in of_domain])


def check_domain(
    name: str,
    domain: DomainConfig,
    *,
    folder: Path,
    seed: int,
    num_wrong_rows: int | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[GoldFacts]:
    """Each reward of one domain; its known bad rows are counted and no problem.

    Args:
        num_wrong_rows: the first rows whose wrong answers are graded; None: all rows'.
        tell: is told how many answers of how many are graded.

    Raises:
        DataError, RecipeError: as `check_gold`.
    """
    rows = rows_to_check(domain.data, folder=folder, seed=seed)
    facts: list[GoldFacts] = []
    graded = _graded(domain)
    for reward in graded:
        try:
            facts.append(
                _facts(
                    name, domain, reward, rows, folder=folder, num_wrong_rows=num_wrong_rows,
                    tell=tell,
                )
            )  # fmt: skip
        except RewardError as error:
            raise DataError(f"domain {name!r}: {error}") from None
    for found in facts:
        if domain.bad_gold == "all" or found.num_bad <= domain.bad_gold:
            found.known, found.problems = found.problems, []
    others = [reward for reward in domain.reward_weights if reward not in graded]
    return [*facts, *(GoldFacts(name, r, len(rows), unchecked=_why(r)) for r in others)]


def _why(reward: str) -> str:
    """Why a reward is not held to gold answers."""
    if reward == JUDGE:
        return "a model's verdict"
    return "it counts for nothing or less" if reward in REWARDS else "yours, beside others"


def _graded(domain: DomainConfig) -> list[str]:
    """The rewards that are to give 1: ours that count for something, and a user's only one."""
    weights = domain.graded_rewards
    named = [name for name, weight in weights.items() if name in REWARDS and weight > 0]
    return named or (list(weights) if len(weights) == 1 else [])


def _facts(
    name: str,
    domain: DomainConfig,
    reward: str,
    rows: Sequence[Row],
    *,
    folder: Path,
    num_wrong_rows: int | None,
    tell: Callable[[int, int], None],
) -> GoldFacts:
    start = monotonic()
    facts = GoldFacts(name, reward, len(rows))
    golds = [_gold(row, reward) for row in rows]
    key = "gold_verdict" if reward == "verdicts" else "answer"
    answers = [row.fields[key] for row in rows if key in row.fields]
    if len(answers) == len(rows):
        facts.best_constant = best_constant(answers)[1]
    given = [
        Case(i, row, gold) for i, (row, gold) in enumerate(zip(rows, golds, strict=True)) if gold
    ]
    cases = [*given, *_wrong(rows, golds, reward, num_rows=num_wrong_rows)]
    facts.num_gold, facts.num_wrong = len(given), len(cases) - len(given)
    items = [_item(case.row, case.turns, domain) for case in cases]
    scores: list[Score] = []
    with Grader({reward: 1.0}, folder=folder, timeout_s=domain.reward_timeout_s) as grader:
        for first in range(0, len(items), TOLD_EVERY):
            scores += grader.score(items[first : first + TOLD_EVERY])
            tell(len(scores), len(items))
    facts.sandbox = grader.facts.get("sandbox")
    graded = list(zip(cases, scores, strict=True))
    missed = [pair for pair in graded[: len(given)] if pair[1].reward != 1.0]
    fooled = [pair for pair in graded[len(given) :] if pair[1].reward >= 1.0]
    facts.num_right = facts.num_gold - len(missed)
    facts.num_fooled = len(fooled)
    facts.problems += _examples(name, reward, "the gold answer", missed)
    borrowed = sum(_content(case.turns) not in FIXED for case, _ in fooled)
    if reward in SHARED or borrowed <= MAX_SHARED * facts.num_wrong:
        fooled = [pair for pair in fooled if _content(pair[0].turns) in FIXED]
    facts.problems += _examples(name, reward, "a wrong answer", fooled)
    ungraded = [pair for pair in graded if not pair[1].terms] if grader.failures["bad_gold"] else []
    if grader.failures["bad_gold"]:
        facts.problems.append(
            f"domain {name!r}, reward {reward!r}: {grader.failures['bad_gold']} answers could not "
            f"be graded, such as: {next((score.reason for _, score in ungraded), '?')}"
        )
    facts.num_bad = len({case.number for case, _ in (*missed, *fooled, *ungraded)})
    facts.seconds = monotonic() - start
    return facts


def _gold(row: Row, reward: str) -> Turns | None:
    """The model's turns of a right answer."""
    if row.response:
        return row.response
    fields = row.fields
    if reward == "verdicts" and "gold_verdict" in fields:
        content = verdict_line(fields["gold_verdict"])
        return [{"role": "assistant", "content": content}]
    if reward not in ANSWERED:
        return None
    calls = fields.get("calls") or fields.get("solution")
    if calls is None and fields.get("call"):
        calls = [fields["call"]]
    if calls is None and "answer" not in fields:
        return None
    turns: Turns = []
    if reward == "tools" and calls:
        turns.append({"role": "assistant", "content": "", "tool_calls": list(calls)})
    return [*turns, {"role": "assistant", "content": str(fields.get("answer", "done"))}]


def _wrong(
    rows: Sequence[Row], golds: Sequence[Turns | None], reward: str, *, num_rows: int | None
) -> Iterator[Case]:
    """Silence for every row; for those with gold also ignorance and the next one's gold."""
    for number, row in enumerate(rows[:num_rows]):
        yield Case(number, row, [{"role": "assistant", "content": FIXED[0]}])
        gold = golds[number]
        if gold is None:
            continue
        if reward not in SHARED:
            yield Case(number, row, [{"role": "assistant", "content": FIXED[1]}])
        other = _others_gold(rows, golds, number)
        if other is not None:
            yield Case(number, row, other)


def _others_gold(rows: Sequence[Row], golds: Sequence[Turns | None], number: int) -> Turns | None:
    """The gold of the next row that asks for another answer; None if none of the next few does."""
    mine, gold = rows[number].fields, golds[number]
    for step in range(1, min(len(rows), NUM_TRIED)):
        place = (number + step) % len(rows)
        other, theirs = golds[place], rows[place].fields
        is_same = mine == theirs or ("answer" in mine and mine["answer"] == theirs.get("answer"))
        if other and gold and not is_same and _differs(other, gold):
            return other
    return None


def _differs(turns: Turns, gold: Turns) -> bool:
    return _content(turns).split() != _content(gold).split()


def _content(turns: Turns) -> str:
    return str(turns[-1]["content"])


def _item(row: Row, turns: Turns, domain: DomainConfig) -> GradeItem:
    fields = {**domain.reward_fields(row.fields), "messages": [*row.messages, *turns]}
    return GradeItem(response=_content(turns), row=fields)


def _examples(name: str, reward: str, what: str, graded: Sequence[tuple[Case, Score]]) -> list[str]:
    """The first few as problems, and how many there are."""
    problems = [
        f"domain {name!r}, reward {reward!r}: {what} {shown(_content(case.turns))} to row "
        f"{case.number + 1}, {shown(case.row.messages[-1]['content'])}, scores {score.reward:g}: "
        f"{score.reason}"
        for case, score in graded[:NUM_EXAMPLES]
    ]
    if len(graded) > NUM_EXAMPLES:
        problems.append(f"domain {name!r}, reward {reward!r}: {what} does so {len(graded)} times")
    return problems


def line_of(fact: GoldFacts) -> str:
    """One reward in words."""
    start = f"{fact.domain}: reward {fact.reward}, {fact.num_rows} rows:"
    if fact.unchecked:
        return f"{start} {fact.unchecked}, not checked"
    right = f"{fact.num_right} of {fact.num_gold} gold answers score 1"
    more = "" if fact.best_constant is None else f"; a constant scores {fact.best_constant:.3f}"
    more += f"; the sandbox's level is {fact.sandbox}" if fact.sandbox else ""
    more += f"; {fact.num_bad} bad rows are known" if fact.known else ""
    return (
        f"{start} {right if fact.num_gold else 'no gold'}, {fact.num_fooled} of {fact.num_wrong} "
        f"wrong ones {'do' if fact.num_gold else 'score 1'}{more} ({fact.seconds:.1f} s)"
    )
