"""Tool use: the calls a model made, what they led to, and its final answer.

    score("done", calls=[{"name": "set", "arguments": {"key": "a", "value": "1"}}], messages=[...])
    score("done", environment={"kind": "store", "start": {}}, state={"a": "1"}, messages=[...])

All that a row gives must hold: `answer`, the stripped response; `call`, made among others; `calls`,
all that were made; `state`, or the state that `solution` (calls) leads to, where the model's calls
on a fresh `environment` end; with `tools`, every call fits its tool's JSON schema. What counts is
what was said since the user last spoke.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.environments import KINDS, MAX_CALLS, Call, replay, tools_of
from rewards.schemas import invalid, same, with_defaults
from rewards.score import RewardError, Score, gold_text, shown

Calls = Sequence[Call]


def score(
    response: str,
    *,
    answer: object = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    call: Call | None = None,
    calls: Calls | None = None,
    is_ordered: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    state: object = None,
    solution: Calls | None = None,
    **_: object,
) -> Score:
    """1 if all that the row asks for holds.

    Args:
        response: the last turn's text.
        answer: what it must be.
        messages: the conversation, the model's calls in its turns' `tool_calls`.
        call: {"name", "arguments"} that must have been made.
        calls: what must have been made, and nothing else; in this order if `is_ordered`.
        tools: {"name", "parameters"} each; defaults of the schema count as given. Without it those
            of the environment, where there is one, say the defaults alone.
        environment: {"kind", "start"} of `rewards.environments`.
        state: what the environment must be like in the end.
        solution: calls that lead there, in place of `state`.
    """
    made = calls_made(messages or ())
    schemas = _schemas(tools, environment)
    problems = [_problem(one, schemas) for one in made[:MAX_CALLS]]
    terms = {"calls": float(len(made))}
    if made and schemas:
        terms["valid"] = problems.count("") / len(problems)
    # With any of these silence scores nothing, wherever the environment ends.
    is_all = answer is None and call is None and not calls
    checks = [
        _invalid_call(made, problems) if tools else "",
        _missing(call, made, schemas) if call is not None else "",
        _other_calls(calls, made, schemas, is_ordered=is_ordered) if calls is not None else "",
        _other_state(environment, made, state, solution, is_all=is_all),
    ]
    problem = next(filter(None, checks), "")
    if problem:
        return Score(0.0, problem, terms)
    if answer is None and (calls is not None or environment is not None):
        return Score(1.0, f"{len(made)} calls, as needed", terms)
    wanted = gold_text(answer, reward="tools")
    if response.strip() != wanted:
        return Score(0.0, f"answered {shown(response.strip())}, needed {shown(wanted)}", terms)
    return Score(1.0, f"answered {shown(wanted)}", terms)


def calls_made(messages: Sequence[Mapping[str, Any]]) -> list[Call]:
    """The calls since the user last spoke: those of the prompt's earlier turns do not count."""
    made: list[Call] = []
    for message in messages:
        if message.get("role") == "user":
            made = []
        elif message.get("role") == "assistant":
            made.extend(message.get("tool_calls") or ())
    return made


Schemas = Mapping[str, Mapping[str, Any]]


def _schemas(tools: Sequence[Mapping[str, Any]], environment: Mapping[str, Any] | None) -> Schemas:
    """Each tool's JSON schema of its arguments."""
    if not tools and environment is not None and environment.get("kind") in KINDS:
        tools = tools_of(environment["kind"])
    if not all(isinstance(tool.get("name"), str) for tool in tools):
        raise RewardError(f"a row's `tools` each need a name: {shown(tools)}")
    return {tool["name"]: tool.get("parameters") or {"type": "object"} for tool in tools}


def _problem(call: Call, schemas: Schemas) -> str:
    """What does not fit the call's schema; empty if it does."""
    name = call.get("name")
    if name not in schemas:
        return f"there is no tool {shown(name)}"
    problem = invalid(call.get("arguments", {}), schemas[str(name)])
    return f"{name}: {problem}" if problem else ""


def _invalid_call(made: Calls, problems: Sequence[str]) -> str:
    if len(made) > MAX_CALLS:
        return f"{len(made)} calls, which is more than {MAX_CALLS}"
    return next((f"an invalid call: {problem}" for problem in problems if problem), "")


def _missing(call: Call, made: Calls, schemas: Schemas) -> str:
    """Why the required call does not count as made; empty when it does."""
    name = _name_of(call)
    if not made:
        return f"no tool was called, needed {name}"
    of_that_name = [other for other in made if other.get("name") == name]
    if not of_that_name:
        return f"called {shown(made[-1].get('name'))}, needed {name}"
    if not any(_same_call(other, call, schemas) for other in of_that_name):
        found = of_that_name[-1].get("arguments")
        return f"called {name} with {shown(found)}, needed {shown(call.get('arguments', {}))}"
    return ""


def _other_calls(wanted: Calls, made: Calls, schemas: Schemas, *, is_ordered: bool) -> str:
    """How the calls differ from those wanted; empty if they do not."""
    for call in wanted:
        _name_of(call)
    if len(made) != len(wanted):
        return f"{len(made)} calls, needed {len(wanted)}"
    left = list(made)
    for number, call in enumerate(wanted, start=1):
        candidates = left[:1] if is_ordered else left
        found = next((i for i, one in enumerate(candidates) if _same_call(one, call, schemas)), -1)
        if found < 0:
            place = f"call {number}" if is_ordered else "no call"
            return f"{place} is not {call['name']} with {shown(call.get('arguments', {}))}"
        del left[found]
    return ""


def _other_state(
    environment: Mapping[str, Any] | None,
    made: Calls,
    state: object,
    solution: Calls | None,
    *,
    is_all: bool,
) -> str:
    """How the environment ends otherwise than it should; empty if it does not. RewardError where
    this `is_all` that is asked, and doing nothing would do."""
    if environment is None:
        if state is not None or solution is not None:
            raise RewardError("reward 'tools' needs an `environment` beside a state or a solution")
        return ""
    if state is not None and solution is not None:
        raise RewardError("reward 'tools': a row has a `state` or a `solution`, not both")
    if state is None and solution is None:
        return ""
    if solution is not None:
        state = replay(environment, solution).state
    if is_all and same(replay(environment, ()).state, state):
        raise RewardError(
            "reward 'tools': a row's environment ends as it starts, so that silence would do: ask "
            "for another state, for calls, or for an answer"
        )
    found = replay(environment, made).state
    return "" if same(found, state) else f"ends as {shown(found)}, needed {shown(state)}"


def _name_of(call: Call) -> str:
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise RewardError(
            "a row's `call` and its `calls` are {'name': text, 'arguments': object} each, but one "
            f"is {shown(call)}"
        )
    return name


def _same_call(found: Call, wanted: Call, schemas: Schemas) -> bool:
    name = wanted["name"]
    if found.get("name") != name:
        return False
    schema = schemas.get(name, {})
    return same(
        with_defaults(found.get("arguments", {}), schema),
        with_defaults(wanted.get("arguments", {}), schema),
    )
