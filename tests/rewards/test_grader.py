"""Rewards of a user's that misbehave in every way, graded beside ones that do not."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards import RewardError
from rewards.failures import LOGGED_FAILURES
from rewards.grader import GradeItem, Grader, check_loads

USER_MODULE = """
import ctypes, os, sys, threading, time
from pathlib import Path
from rewards import Score

VALUES = {
    "nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "list": [1.0],
    "huge": 10**400, "nan in Score": Score(float("nan"), ""), "no reason": Score(1.0, None),
    "nan in terms": Score(1.0, "", {"part": float("nan")}),
    "text in terms": Score(1.0, "", {"part": "1"}),
}
DEEDS = {
    "raise": lambda: 1 / 0,
    "sys.exit": lambda: sys.exit(0),
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
    "recursion": lambda: DEEDS["recursion"](),
    "memory": lambda: bytearray(2**40),
    "sleep": lambda: time.sleep(60),
    "spin": lambda: 9**9**9,
    "os._exit": lambda: os._exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "abort": lambda: os.abort(),
}

def reward(response, *, answer=None, **row):
    if response in VALUES:
        return VALUES[response]
    if response in DEEDS:
        return DEEDS[response]()
    return response == answer

def noisy(response, *, answer=None, **row):
    print("{}\\n" * 1000)
    sys.stdout.write('{"reward": 9.0}\\n')
    os.write(1, b'{"reward": 9.0, "reason": "", "terms": {}, "failure": ""}\\n')
    return Score(float(sys.stdin.read() == "" and response == answer), "noise", {"loud": 1.0})

def short(response, answer):
    return Score(1.0 / max(1, len(response)), "length")

def environment(response, **row):
    return Score(1.0, str([os.environ.get(key) for key in ("RAY_AUTH_TOKEN", "KEPT_FOR_REWARDS")]))

def where(response, **row):
    return Score(1.0, str(Path.cwd()))

def pid(response, **row):
    return os.getpid()

def hang(response, **row):
    Path("worker.pid").write_text(str(os.getpid()))
    DEEDS[response]()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER_MODULE)
    return tmp_path


def grade_one(grader: Grader, response: str) -> tuple[float, str]:
    score = grader.score([GradeItem(response, {"answer": "yes"})])[0]
    return score.reward, score.reason


NEGATIVES = [{"call": f"f({x})", "expect": str(-x)} for x in (1, 2, 3)]
NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("reward", "response", "row"),
    [
        ("exact", "a b", {"answer": "a b"}),
        ("instructions", "one two three", NO_COMMA),
        ("mathematics", "\\boxed{(x+1)^2}", {"answer": "x^2+2x+1"}),
        ("programs", "x[::-1]", {"tests": [{"x": "abc", "expect": "cba"}]}),
        ("programs", "def f(x): return -x", {"tests": NEGATIVES, "sandbox": "limits"}),
        ("tools", "42", {"answer": 42, "messages": [{"role": "user", "content": "?"}]}),
    ],
)
def test_the_gold_answer_of_each_reward_scores_exactly_1(
    reward: str, response: str, row: dict[str, object]
) -> None:
    with Grader({reward: 1.0}) as grader:
        (score,) = grader.score([GradeItem(response, {**row, "response": "a demonstration"})])
    assert score.reward == 1.0
    assert score.terms[reward] == 1.0
    assert not grader.failures


def test_each_item_gets_its_own_score_across_batches() -> None:
    items = [GradeItem(str(n % 7), {"answer": str(n % 5)}) for n in range(1_000)]
    with Grader({"exact": 1.0}) as grader:
        rewards = [score.reward for score in grader.score(items)]
        assert grader.score([]) == []
    assert rewards == [float(n % 7 == n % 5) for n in range(1_000)]


def test_the_reward_is_the_weighted_sum_of_its_terms(folder: Path) -> None:
    with Grader({"exact": 1.0, "mine:short": -0.5, "mine:noisy": 0.25}, folder=folder) as grader:
        right, wrong = grader.score(
            [GradeItem("yes", {"answer": "yes"}), GradeItem("nope", {"answer": "yes"})]
        )
    # 1 - 0.5 / 3 + 0.25 and 0 - 0.5 / 4 + 0
    assert right.reward == pytest.approx(1.25 - 0.5 / 3, abs=1e-12)
    assert wrong.reward == pytest.approx(-0.125, abs=1e-12)
    assert right.terms == {
        "exact": 1.0,
        "mine:short": 1 / 3,
        "mine:noisy": 1.0,
        "mine:noisy/loud": 1.0,
    }
    assert "exact: 'nope' against 'yes'" in wrong.reason


def test_what_rewards_print_and_read_does_not_reach_the_protocol(folder: Path) -> None:
    with Grader({"mine:noisy": 1.0}, folder=folder) as grader:
        scores = grader.score([GradeItem(word, {"answer": "yes"}) for word in ("yes", "no", "yes")])
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("response", "kind", "reason"),
    [
        ("raise", "raised", "ZeroDivisionError"),
        ("sys.exit", "raised", "SystemExit"),
        ("interrupt", "raised", "KeyboardInterrupt"),
        ("recursion", "raised", "RecursionError"),
        ("memory", "raised", "MemoryError"),
        ("nan", "not_finite", "nan"),
        ("inf", "not_finite", "inf"),
        ("huge", "not_finite", "inf"),
        ("nan in Score", "not_finite", "nan"),
        ("nan in terms", "not_finite", "mine:reward/part is nan"),
        ("text", "wrong_type", "str"),
        ("none", "wrong_type", "NoneType"),
        ("list", "wrong_type", "list"),
        ("no reason", "wrong_type", "Score"),
        ("text in terms", "wrong_type", "mine:reward/part is str"),
    ],
)
def test_a_reward_that_fails_is_a_zero_with_a_reason(
    misbehaving: Grader, response: str, kind: str, reason: str
) -> None:
    before = misbehaving.failures[kind]
    found, why = grade_one(misbehaving, response)
    assert found == 0.0
    assert reason in why
    assert misbehaving.failures[kind] == before + 1
    assert grade_one(misbehaving, "yes")[0] == 1.0


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("misbehaving")
    (folder / "mine.py").write_text(USER_MODULE)
    with Grader({"mine:reward": 1.0}, folder=folder) as grader:
        yield grader


@pytest.mark.parametrize(
    ("response", "reason"),
    [("os._exit", "code 0"), ("segfault", "SIGSEGV"), ("abort", "SIGABRT")],
)
def test_a_reward_that_ends_its_process_costs_one_item(
    folder: Path, response: str, reason: str
) -> None:
    items = [
        GradeItem(word, {"answer": "yes"}) for word in ("yes", response, "yes", response, "yes")
    ]
    with Grader({"mine:reward": 1.0}, folder=folder) as grader:
        scores = grader.score(items)
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert reason in scores[1].reason
    assert grader.failures == {"died": 2}


@pytest.mark.parametrize("response", ["sleep", "spin"])
def test_a_reward_that_hangs_is_stopped_at_its_deadline(folder: Path, response: str) -> None:
    items = [GradeItem(word, {"answer": "yes"}) for word in ("yes", response, "yes")]
    with Grader({"mine:reward": 1.0}, folder=folder, timeout_s=0.5) as grader:
        start = time.monotonic()
        scores = grader.score(items)
        assert time.monotonic() - start < 20.0
    assert [score.reward for score in scores] == [1.0, 0.0, 1.0]
    assert "0.5 s" in scores[1].reason
    assert grader.failures == {"timeout": 1}


def test_the_reasons_of_the_first_failures_are_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = [GradeItem("raise")] * (LOGGED_FAILURES + 2) + [GradeItem("sleep")]
    with Grader({"mine:reward": 1.0}, folder=folder, timeout_s=0.5) as grader:
        grader.score(items)
    assert grader.failures == {"raised": LOGGED_FAILURES + 2, "timeout": 1}
    told = [record.getMessage() for record in caplog.records]
    raised = [text for text in told if "(raised): mine:reward raised ZeroDivisionError" in text]
    assert len(raised) == LOGGED_FAILURES
    assert told[0].startswith("reward mine:reward: 'raise' scores 0 (raised): ")
    assert told[-2:] == [
        "reward mine:reward: 'sleep' scores 0 (timeout): no score after 0.5 s",
        f"reward mine:reward: answers that scored 0: raised {LOGGED_FAILURES + 2}, timeout 1",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0\n", "`import own` raised ZeroDivisionError.*mend"),
        ("import os\nos._exit(3)\n", "exited with code 3"),
        ("reward = 5\n", "is int, not a function"),
        ("import time\ntime.sleep(60)\n", None),
        ("", None),
    ],
)
def test_a_module_that_fails_is_known_before_any_training(
    tmp_path: Path, source: str, message: str | None
) -> None:
    (tmp_path / "own.py").write_text("def reward(response): ...\n" + source)
    if message is None:
        check_loads(["own:reward"], tmp_path, timeout_s=5.0)
    else:
        with pytest.raises(RewardError, match=message):
            check_loads(["own:reward"], tmp_path, timeout_s=30.0)


def test_bad_gold_is_counted_by_itself() -> None:
    unsendable = threading.Lock()
    with Grader({"exact": 1.0}) as grader:
        scores = grader.score(
            [GradeItem("a", {}), GradeItem("a", {"answer": "a", "x": unsendable})]
        )
    assert [score.reward for score in scores] == [0.0, 0.0]
    assert "answer" in scores[0].reason
    assert "lock" in scores[1].reason
    assert grader.failures == {"bad_gold": 2}


def test_a_process_killed_between_two_calls_is_replaced(folder: Path) -> None:
    with Grader({"mine:pid": 1.0}, folder=folder) as grader:
        pid = int(grader.score([GradeItem("")])[0].reward)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        assert int(grader.score([GradeItem("")])[0].reward) != pid
    assert not grader.failures


def test_rewards_run_in_the_recipes_folder_without_rays_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("KEPT_FOR_REWARDS", "kept")
    with Grader({"mine:environment": 1.0, "mine:where": 1.0}, folder=folder) as grader:
        reason = grader.score([GradeItem("")])[0].reason
    assert "[None, 'kept']" in reason
    assert str(folder.resolve()) in reason


def test_a_stranger_called_rewards_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    with Grader({"exact": 1.0}) as grader:
        assert grader.score([GradeItem("a", {"answer": "a"})])[0].reward == 1.0


def test_threads_share_a_grader_and_outlive_the_thread_that_made_it(folder: Path) -> None:
    made: list[Grader] = []
    maker = threading.Thread(
        target=lambda: made.append(Grader({"mine:reward": 1.0}, folder=folder, timeout_s=0.5))
    )
    maker.start()
    maker.join()
    found: dict[int, list[float]] = {}

    def grade(number: int) -> None:
        words = ["yes"] * number + (["sleep"] if number == 2 else []) + ["no"]
        items = [GradeItem(word, {"answer": "yes"}) for word in words]
        found[number] = [score.reward for score in made[0].score(items)]

    threads = [threading.Thread(target=grade, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made[0].close()
    assert found == {0: [0.0], 1: [1.0, 0.0], 2: [1.0, 1.0, 0.0, 0.0], 3: [1.0, 1.0, 1.0, 0.0]}
    assert made[0].failures == {"timeout": 1}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "at least one"),
        ({"mathematic": 1.0}, "mathematics"),
        ({"mine:nothing": 1.0}, "defines no 'nothing'"),
        ({"nowhere:reward": 1.0}, "no module"),
        ({"exact": float("nan")}, "finite"),
        ({"exact": 1.0, "torn:reward": 1.0}, "`import torn` raised ModuleNotFoundError.*mend"),
        ({"deadly:reward": 1.0}, "exited with code 3"),
        ({"mine:VALUES": 1.0}, "not a function"),
    ],
)
def test_an_unusable_reward_is_refused_before_anything_is_graded(
    folder: Path, rewards: dict[str, float], message: str
) -> None:
    (folder / "torn.py").write_text("import nowhere_to_be_found\ndef reward(response): ...")
    (folder / "deadly.py").write_text("import os\nos._exit(3)\ndef reward(response): ...")
    with pytest.raises(RewardError, match=message):
        Grader(rewards, folder=folder)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PARENT = """
import sys, threading
from pathlib import Path
from rewards.grader import GradeItem, Grader

def grade():
    grader = Grader({"mine:hang": 1.0}, folder=Path.cwd(), timeout_s=300.0)
    grader.score([GradeItem(sys.argv[2])] if sys.argv[2] else [])
    if not sys.argv[2]:
        Path("worker.pid").write_text(str(grader._worker.pid))
        threading.Event().wait()

if sys.argv[1] == "main":
    grade()
else:
    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("thread", "response"), [("main", ""), ("main", "sleep"), ("main", "spin"), ("other", "sleep")]
)
def test_the_process_dies_with_its_parent(folder: Path, thread: str, response: str) -> None:
    home = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, thread, response],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(home)},
    )
    file = folder / "worker.pid"
    wait_until(lambda: file.exists() and file.read_text() != "")
    pid = int(file.read_text())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(pid))


def test_the_kernel_ends_a_reward_that_spins_where_nobody_waits() -> None:
    program = "from rewards.worker import limit_cpu; limit_cpu(0.0); 9**9**9"
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGXCPU
