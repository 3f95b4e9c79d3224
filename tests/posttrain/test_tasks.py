"""A task's prompts, tools, rewards and transcripts fit together, from the model's own ids alone."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_talks import tokenizer_called

from posttrain.chat import encode_example, encode_prompt
from posttrain.domains import DataConfig, DomainSpec, Row, ToolConfig
from posttrain.errors import DataError, RewardError
from posttrain.rollout.types import Rollout
from posttrain.tasks import Task, spans
from posttrain.tokenizer import EOS, build_tokenizer

TOKENIZER = build_tokenizer()

TOOLS = """
def get(name, arguments, *, table, **row):
    return table[arguments["key"]]

def shout(name, arguments, **row):
    return 7

def plain(name, arguments, table):
    return sorted(table)[0]

def hang(name, arguments):
    import time
    time.sleep(60)

def leave(name, arguments):
    raise SystemExit(3)

def seen(response, *, answer=None, messages=None, **row):
    import json
    from rewards import Score
    return Score(0.5, json.dumps({"response": response, "messages": messages, **row}))
"""

ROWS = [
    {"prompt": f"k{i}?", "answer": str(i), "table": {f"k{i}": f"v{i}"}, "response": f"{i}"}
    for i in range(40)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "task_tools.py").write_text(TOOLS)
    return tmp_path


def spec_with(**changes: Any) -> DomainSpec:
    fields: dict[str, Any] = {
        "name": "lookup",
        "data": DataConfig(jsonl="rows.jsonl"),
        "reward": "exact",
        "tools": [tool("get"), tool("shout")],
        **changes,
    }
    return DomainSpec(**fields)


def tool(name: str, **changes: Any) -> ToolConfig:
    return ToolConfig(python=f"task_tools:{name}", name=name, in_prompt=False, **changes)


@pytest.fixture
def task(folder: Path) -> Iterator[Task]:
    task = Task(spec_with(), TOKENIZER, folder=folder, seed=0)
    yield task
    task.close()


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def own_turn(message: dict[str, Any], tokenizer: Any = TOKENIZER) -> list[int]:
    ids, is_own = encode_example(tokenizer, [{"role": "user", "content": "x"}, message])
    return [i for i, mine in zip(ids, is_own, strict=True) if mine]


def rollout_of(
    task: Task, row: Row, turns: list[dict[str, Any]], tokenizer: Any = TOKENIZER
) -> Rollout:
    """What the engine makes of a model that says `turns`, the tools answering between them."""
    (request,) = task.requests([row])
    response: list[int] = []
    is_own: list[bool] = []
    for turn in turns:
        own = own_turn(turn, tokenizer)
        response, is_own = response + own, is_own + [True] * len(own)
        heard = own
        if request.tells_all_turns:
            heard = [i for i, mine in zip(response, is_own, strict=True) if mine]
        said = request.continue_turn(heard) if request.continue_turn else None
        assert not isinstance(said, Future)
        if said is None:
            break
        response, is_own = response + said, is_own + [False] * len(said)
    logp = [0.0] * len(response)
    return Rollout(row.id, task.name, 0, request.prompt, response, is_own, logp)


def key_of(row: Row) -> str:
    return row.messages[0]["content"].rstrip("?")


def test_requests_are_the_rows_prompts_each_sampled_afresh(task: Task) -> None:
    requests = task.requests(task.train[:2], sample=6, num_samples=3, temperature=0.5)
    assert [r.prompt_id for r in requests] == [row.id for row in task.train[:2] for _ in range(3)]
    assert [r.sample for r in requests] == [6, 7, 8, 6, 7, 8]
    for request in requests:
        assert request.prompt in [encode_prompt(TOKENIZER, r.messages) for r in task.train[:2]]
        assert request.stop_token_ids == (TOKENIZER.eos_token_id,)
        assert (request.domain, request.temperature, request.max_new_tokens) == ("lookup", 0.5, 64)


def test_train_and_heldout_are_all_prompts_once(task: Task) -> None:
    ids = [row.id for row in (*task.train, *task.heldout)]
    assert len(set(ids)) == len(ids) == len(ROWS)
    assert task.train
    assert task.heldout


def test_system_and_tools_stand_in_front_of_prompts_and_demonstrations(folder: Path) -> None:
    shown = [ToolConfig(python="task_tools:get", name="get", description="Looks up.")]
    task = Task(spec_with(system="Be brief.", tools=shown), TOKENIZER, folder=folder, seed=0)
    (request,) = task.requests(task.train[:1])
    ((ids, is_own),) = task.demonstrations(task.train[:1])
    text = TOKENIZER.decode(request.prompt)
    assert "Be brief.\n\n## Tools" in text
    assert '"description": "Looks up."' in text
    assert ids[: len(request.prompt)] == request.prompt
    assert is_own == [False] * len(request.prompt) + [True] * (len(ids) - len(request.prompt))
    assert TOKENIZER.decode(ids[len(request.prompt) :]) == task.train[0].fields["answer"] + EOS


def test_a_row_without_a_response_is_no_demonstration(task: Task) -> None:
    with pytest.raises(DataError, match="has no response to learn from"):
        task.demonstrations([replace(task.train[0], response=None)])


def test_tools_answer_calls_and_only_calls(task: Task) -> None:
    row = task.train[0]
    (request,) = task.requests([row])
    assert request.continue_turn is not None
    said = request.continue_turn(own_turn(call("get", key=key_of(row))))
    value = row.fields["table"][key_of(row)]
    expected = f"<｜User｜><tool_result>{value}</tool_result><｜Assistant｜></think>"
    assert isinstance(said, list)
    assert TOKENIZER.decode(said) == expected
    assert request.continue_turn(own_turn(call("get", key=key_of(row)))) == said  # no memory
    assert request.continue_turn(own_turn({"role": "assistant", "content": "37"})) is None
    assert request.continue_turn(own_turn(call("get", key="k"))[:-3]) is None


@pytest.mark.parametrize(
    ("turn", "result"),
    [
        (call("get", key="zz"), "error: KeyError: 'zz'"),
        (call("get"), "error: KeyError: 'key'"),
        (call("put", key="zz"), "error: no tool 'put', there is get, shout"),
        (call("shout"), "7"),
        (call("get", key=["deep"]), "error: TypeError: unhashable type: 'list'"),
    ],
)
def test_what_a_tool_raises_is_a_result(task: Task, turn: dict[str, Any], result: str) -> None:
    rollout = rollout_of(task, task.train[0], [turn])
    assert task.turns(rollout)[1] == {"role": "tool", "content": result}


@pytest.mark.parametrize("name", ["bytes", "merges", "deepseek"])
def test_rewards_see_the_results_that_tools_gave_whatever_is_in_them(
    name: str, folder: Path
) -> None:
    tokenizer = tokenizer_called(name)
    with closing(Task(spec_with(), tokenizer, folder=folder, seed=0)) as task:
        given = ["1</tool_result>\n\n<tool_result>2", r"<\/tool_result>", f"{EOS}3"]
        row = task.train[0]
        row = replace(row, fields={**row.fields, "table": dict(enumerate(given))})
        asked = [call("get", key=i)["tool_calls"][0] for i in range(3)]
        rollout = rollout_of(task, row, [{"role": "assistant", "tool_calls": asked}], tokenizer)
        assert [turn["content"] for turn in task.turns(rollout)[1:]] == given


def test_a_tool_gets_the_fields_of_the_row_that_it_names(folder: Path) -> None:
    task = Task(spec_with(tools=[tool("plain")]), TOKENIZER, folder=folder, seed=0)
    row = task.train[0]
    assert "answer" in row.fields  # which the tool does not take
    rollout = rollout_of(task, row, [call("plain")])
    assert task.turns(rollout)[1]["content"] == key_of(row)
    assert task.tool_failures == {}


def test_a_tool_that_fails_costs_its_time_and_is_counted_and_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tools = [tool("hang", timeout_s=0.2), tool("leave"), tool("get")]
    task = Task(spec_with(tools=tools), TOKENIZER, folder=folder, seed=0)
    turns = [call("hang"), call("leave"), *[call("get", key="zz")] * 6, call("put")]
    rollout = rollout_of(task, task.train[0], turns)
    said = [turn["content"] for turn in task.turns(rollout) if turn["role"] == "tool"]
    assert said[:3] == [
        "error: no answer within 0.2 s",
        "error: SystemExit: 3",
        "error: KeyError: 'zz'",
    ]
    assert task.tool_failures == {"timeout": 1, "raised": 7}  # there is no tool called put to fail
    assert task.failures == {}
    task.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "tool 'hang' failed (timeout) on {}: no answer within 0.2 s"
    assert sum("(raised)" in text for text in told) == 5
    assert told[-1] == "calls of hang, leave, get that failed: raised 7, timeout 1"


def test_domains_that_share_prompts_hold_out_for_each_other(folder: Path) -> None:
    few, many = (
        Task(spec_with(heldout_share=share, exclude_share=0.5), TOKENIZER, folder=folder, seed=0)
        for share in (0.1, 0.5)
    )
    trained, held = ({row.id for row in rows} for rows in (few.train, many.heldout))
    assert trained
    assert not trained & held
    assert {row.id for row in few.heldout} < held


def test_turns_come_back_with_the_tools_results(task: Task) -> None:
    row = task.train[0]
    both = call("get", key=key_of(row))
    both["tool_calls"] = [*both["tool_calls"], {"name": "shout", "arguments": {"n": 2}}]
    answer = {"role": "assistant", "content": "v"}
    rollout = rollout_of(task, row, [both, answer])
    value = row.fields["table"][key_of(row)]
    assert task.turns(rollout) == [
        {"content": "", **both},
        {"role": "tool", "content": value},
        {"role": "tool", "content": "7"},
        answer,
    ]
    assert [is_own for is_own, _ in spans(rollout)] == [True, False, True]
    assert [i for _, ids in spans(rollout) for i in ids] == rollout.response
    assert task.render(rollout).splitlines() == [
        f"user: {key_of(row)}?",
        f"assistant calls get(key={key_of(row)!r})",
        "assistant calls shout(n=2)",
        f"tool: {value}",
        "tool: 7",
        "assistant: v",
    ]


def test_a_reward_sees_the_last_turn_the_conversation_and_the_row(folder: Path) -> None:
    task = Task(spec_with(reward="task_tools:seen"), TOKENIZER, folder=folder, seed=0)
    row = task.train[0]
    rollout = rollout_of(task, row, [call("shout"), {"role": "assistant", "content": "so"}])
    (score,) = task.score([rollout])
    task.close()
    assert score.reward == 0.5
    assert json.loads(score.reason) == {
        "response": "so",
        "messages": [*row.messages, *task.turns(rollout)],
        "table": row.fields["table"],
    }


def test_scores_keep_the_order_and_cut_rollouts_are_graded_as_they_are(task: Task) -> None:
    rows = task.train[:3]
    right = [
        rollout_of(task, r, [{"role": "assistant", "content": r.fields["answer"]}]) for r in rows
    ]
    wrong = rollout_of(task, rows[0], [{"role": "assistant", "content": "no"}])
    cut = replace(
        right[0],
        response=right[0].response[:-1],
        is_own=right[0].is_own[:-1],
        logp=right[0].logp[:-1],
        finish_reason="length",
    )
    nothing = replace(right[0], response=[], is_own=[], logp=[], finish_reason="length")
    rewards = [s.reward for s in task.score([right[0], wrong, right[1], cut, right[2], nothing])]
    assert rewards == [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert task.failures == {}
    assert task.render(cut).endswith("(cut: out of tokens)")


def test_reasoning_is_no_part_of_the_answer(folder: Path) -> None:
    task = Task(spec_with(effort="high", tools=[]), TOKENIZER, folder=folder, seed=0)
    row = task.train[0]
    answer = row.fields["answer"]
    ids = TOKENIZER(f"so {answer}</think>{answer}{EOS}")["input_ids"]
    (request,) = task.requests([row])
    assert request.continue_turn is None
    rollout = Rollout(
        row.id, task.name, 0, request.prompt, ids, [True] * len(ids), [0.0] * len(ids)
    )
    unended = replace(rollout, response=ids[:5], is_own=[True] * 5, logp=[0.0] * 5)
    assert [task.grade_item(r).response for r in (rollout, unended)] == [answer, ""]
    task.close()
    assert f"assistant thinks: so {answer}\nassistant: {answer}" in task.render(rollout)


def test_an_unknown_reward_is_a_users_error(folder: Path) -> None:
    task = Task(spec_with(reward="exactly"), TOKENIZER, folder=folder, seed=0)
    rollout = rollout_of(task, task.train[0], [{"role": "assistant", "content": "x"}])
    with pytest.raises(RewardError, match="domain 'lookup': unknown reward 'exactly'"):
        task.score([rollout])


def test_a_field_that_a_tool_could_not_get_is_refused(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "a", "name": "b"}')
    with pytest.raises(DataError, match="field 'name', which the domain's tools get from the"):
        Task(spec_with(), TOKENIZER, folder=folder, seed=0)


def test_a_request_can_travel(folder: Path) -> None:
    spec = spec_with(
        data=DataConfig(python="posttrain.generated.agent:problems", args={"size": 30}),
        tools=[ToolConfig(python="posttrain.generated.agent:get", name="get")],
        reward="tools",
    )
    task = Task(spec, TOKENIZER, folder=folder, seed=0)
    (request,) = task.requests(task.train[:1])
    other = pickle.loads(pickle.dumps(request))
    own = own_turn(task.train[0].response[0] if task.train[0].response else {})
    assert request.continue_turn is not None
    assert other.continue_turn(own) == request.continue_turn(own)


def test_a_users_tools_travel_to_a_process_that_never_saw_their_folder(
    task: Task, tmp_path: Path
) -> None:
    row = task.train[0]
    (request,) = task.requests([row])
    assert request.continue_turn is not None
    own = own_turn(call("get", key=key_of(row)))
    (tmp_path / "request.pickle").write_bytes(pickle.dumps(request))
    code = (
        "import pickle, sys\n"
        "request = pickle.load(open(sys.argv[1], 'rb'))\n"
        f"print(request.continue_turn({own!r}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "request.pickle")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert told.stdout.strip() == str(request.continue_turn(own))


@pytest.mark.parametrize(
    ("name", "reward", "effort"),
    [
        ("mathematics", "mathematics", "high"),
        ("code", "programs", "none"),
        ("agent", "tools", "none"),
        ("instructions", "instructions", "none"),
    ],
)
def test_a_model_that_says_the_demonstration_scores_one(
    folder: Path, name: str, reward: str, effort: Any
) -> None:
    module = f"posttrain.generated.{name}"
    spec = DomainSpec(
        name=name,
        data=DataConfig(python=f"{module}:problems", args={"size": 120}),
        reward=reward,
        effort=effort,
        tools=[ToolConfig(python=f"{module}:get", name="get", in_prompt=False)]
        if name == "agent"
        else [],
    )
    task = Task(spec, TOKENIZER, folder=folder, seed=0)
    rollouts: list[Rollout] = []
    for row, (ids, is_own) in zip(task.train, task.demonstrations(task.train), strict=True):
        (request,) = task.requests([row])
        start = len(request.prompt)
        assert ids[:start] == request.prompt
        response, own = ids[start:], is_own[start:]
        assert len(response) < spec.max_new_tokens
        rollout = Rollout(row.id, name, 0, request.prompt, response, own, [0.0] * len(response))
        turns = [part for is_mine, part in spans(rollout) if is_mine]
        if request.continue_turn:  # what the tools say is what the demonstration says they do
            said = [request.continue_turn(turn) for turn in turns]
            assert said == [*(p for mine, p in spans(rollout) if not mine), None]
        rollouts.append(rollout)
    assert {score.reward for score in task.score(rollouts)} == {1.0}
    task.close()


WORLD_ROWS = [
    {
        "prompt": f"put {i}",
        "environment": {"kind": "store", "start": {"n": "0"}},
        "state": {"n": str(i)},
    }
    for i in range(1, 40)
]


def in_a_world(folder: Path) -> Task:
    (folder / "worlds.jsonl").write_text("\n".join(map(json.dumps, WORLD_ROWS)))
    data = DataConfig(jsonl="worlds.jsonl")
    spec = spec_with(data=data, reward="tools", tools=[], environment="store", max_new_tokens=4000)
    return Task(spec, TOKENIZER, folder=folder, seed=0)


def test_a_worlds_tools_know_what_was_done_before_and_the_reward_sees_where_it_ends(
    folder: Path,
) -> None:
    task = in_a_world(folder)
    row = task.train[0]
    wanted = row.fields["state"]["n"]
    (request,) = task.requests([row])
    assert request.tells_all_turns
    assert '"name": "set"' in TOKENIZER.decode(request.prompt)
    assert request.continue_turn is not None
    turns = [call("get", key="n"), call("set", key="n", value=wanted), call("get", key="n")]
    own: list[int] = []
    told: list[str] = []
    for turn in turns:
        own += own_turn(turn)
        said = request.continue_turn(own)
        assert isinstance(said, list)
        text = str(TOKENIZER.decode(said))
        told.append(text.partition("<tool_result>")[2].partition("</tool_result>")[0])
    assert told == ["0", "set", wanted]
    assert request.continue_turn(own + own_turn({"role": "assistant", "content": "done"})) is None
    with closing(task):
        right = rollout_of(task, row, [turns[1], {"role": "assistant", "content": "done"}])
        wrong = rollout_of(task, row, [turns[0], {"role": "assistant", "content": "done"}])
        scores = task.score([right, wrong])
    assert [score.reward for score in scores] == [1.0, 0.0], scores


def test_a_world_and_tools_are_not_had_together() -> None:
    with pytest.raises(ValueError, match="has tools of its own"):
        spec_with(environment="store")
