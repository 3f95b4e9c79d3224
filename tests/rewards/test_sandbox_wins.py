"""Winning without answering, at every level: what is judged is judged outside."""

import os
import time

import pytest

from rewards.programs import score
from rewards.sandbox import _SHARED, Sandbox

SQUARES = [{"call": f"f({x})", "expect": str(x * x)} for x in (2, 3, 5)]


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "def f(x): raise SystemExit(0)",
        "import os\ndef f(x): os._exit(0)",
        "class Any:\n  def __eq__(self, other): return True\n"
        "  def __ne__(self, other): return False\n"
        "  def __hash__(self): return 4\ndef f(x): return Any()",
        "class Any(int):\n  def __eq__(self, other): return True\ndef f(x): return Any()",
        "import builtins\nbuiltins.repr = lambda x: '4'\ndef f(x): return 1",
        "import builtins\nbuiltins.eval = lambda *a: True\ndef f(x): return 1",
        "import json\njson.dumps = lambda x: '\"4\"'\ndef f(x): return 1",
        "print('4'); print('9'); print('25'); print('all 3 tests pass')",
        "import os\nos.write(3, b'=\"4\"\\n' * 3); os._exit(0)",
        "import os\nos.write(3, b'{\"end\": \"ended\"}\\n' * 3); os._exit(0)",
        "import os\nfor n in range(64):\n  try: os.write(n, b'\\0' * 7 + b'\\x02{}')\n"
        "  except OSError: pass\nos._exit(0)",
        "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n"
        "    for v in frame.f_locals.values():\n"
        "      if isinstance(v, dict) and 'tests' in v: return v['tests'][0]['expect']\n"
        "      if isinstance(v, dict) and 'expect' in v: return v['expect']\n"
        "    frame = frame.f_back",
        "import gc\ndef f(x):\n  for o in gc.get_objects():\n"
        "    if isinstance(o, dict) and 'expect' in o: return int(o['expect'])",
        "def f(x): return 4",
        "def f(x): return float(x * x)",
        "def f(x): return (x * x,)",
        "def f(x): return str(x * x)",
        "def f(x): print(x * x)",
        "f = lambda x: (yield x * x)",
        "class f(int):\n  def __repr__(self): return 'f'",
        "class f:\n  def __init__(self, x): pass\n  def __repr__(self): return 'exit(4)'",
        "def f(x): return '[' * 50000",
        "class f:\n  def __init__(self, x): pass\n  def __repr__(self): return '[' * 50000",
        "class f:\n  def __init__(self, x): pass\n  def __repr__(self): return '-' * 90000 + '4'",
        "class f:\n  def __init__(self, x): pass\n  def __repr__(self): return 'x' * 10**7",
        "", "\x00", "\ud800", "def f(x", "return 4", "```", "import f", "f = 4",
    ],
)  # fmt: skip
def test_nobody_wins_without_the_answers(
    sandbox: Sandbox, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHARED, (os.getpid(), "limits"), sandbox)  # and no better one
    start = time.monotonic()
    found = score(program, tests=SQUARES, sandbox="limits")
    assert found.reward == 0.0, found.reason
    assert found.reason
    assert time.monotonic() - start < 5.0
