"""Hostile answers for each grader: none may score, and each must end in time."""

from typing import Any

Row = dict[str, Any]

SQUARES = [{"call": f"f({x})", "expect": str(x * x)} for x in (2, 3, 5)]
LOOP_ALL = "\nwhile True: pass"
ANSWER = "\ndef f(x): return x * x"
"""Reached where what stands before it was allowed, so that the attack scores."""

PROGRAMS = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": "import threading, time\nfor _ in range(99):\n  threading.Thread("
    "target=time.sleep, args=(9,), daemon=True).start()" + ANSWER,
    "memory bomb": "x = bytearray(2**30)" + ANSWER,
    "endless loop": "while True: pass",
    "9**9**9": "x = 9**9**9",
    "ignored signals": "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, "
    "signal.SIG_IGN)\n  except Exception: pass\nwhile True: pass",
    "write outside": "open('/var/tmp/x', 'w').write('x')" + ANSWER,
    "network": "import socket; socket.socket()" + ANSWER,
    "environment, by /proc": "open('/proc/self/environ').read()" + ANSWER,
    "kill the parent": "import os\nos.kill(os.getppid(), 9)" + ANSWER,
    "ptrace": "import ctypes\nif ctypes.CDLL(None).ptrace(0, 0, 0, 0): raise OSError" + ANSWER,
    "200 MB of output": "print('x' * 200_000_000)" + LOOP_ALL,
    "flooded results": "import os\nwhile True: os.write(3, b'=\"4\"\\n' * 9999)",
    "sys.exit(0)": "import sys; sys.exit(0)",
    "os._exit(0)": "import os; os._exit(0)",
    "patched __eq__": "class f(int):\n  def __eq__(self, other): return True\n"
    "  def __repr__(self): return 'f'",
    "patched repr": "import builtins; builtins.repr = lambda x: '4'\ndef f(x): return 0",
    "patched eval": "import builtins; builtins.eval = lambda *a: 4\ndef f(x): return 0",
    "patched json": "import json; json.dumps = lambda x: '\"4\"'\ndef f(x): return 0",
    "forged results": 'import os; os.write(3, b\'="4"\\n="9"\\n\'); os._exit(0)',
    "frame walking": "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n"
    "    if 'tests' in frame.f_locals: return frame.f_locals['tests'][0]['expect']\n"
    "    frame = frame.f_back",
    "heap walking": "import gc\ndef f(x):\n  for o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'expect' in o: return o['expect']",
    "daemonise": "import os\nif os.fork(): os._exit(0)\nos.setsid()" + LOOP_ALL,
    "threads left behind": "import threading\nthreading.Thread(target=lambda: [0 for _ in "
    "iter(int, 1)]).start()",
    "constant": "def f(x): return 4",
    "float for int": "def f(x): return float(x * x)",
    "nested repr": "class f:\n  def __init__(self, x): pass\n  def __repr__(self): return '[' * "
    "50_000",
    "segfault": "import ctypes; ctypes.string_at(0)",
    "regex": "import re; re.match('(a|a)*b', 'a' * 40)",
    "no code": "",
    "surrogates": "\ud800",
}

MATHEMATICS = {
    "tower": "\\boxed{9^{9^{9}}}",
    "factorials": "\\boxed{((9!)!)!}",
    "power of a sum": "\\boxed{(x+y)^{5000}}",
    "binomial": "\\boxed{\\binom{10000000}{5000000}}",
    "sum": "\\boxed{\\sum_{n=1}^{99999999} n^n}",
    "integral": "\\boxed{\\int_0^1 x^x dx}",
    "nested powers": "\\boxed{((((x+1)^9+y)^9+z)^9+w)^9}",
    "3,000 braces": "{" * 3_000,
    "braces in a box": "\\boxed{" + "{" * 100_000,
    "50,000 numbers": "1," * 50_000,
    "2,000-element set": "\\boxed{\\{" + ",".join(map(str, range(2_000))) + "\\}}",
    "many factors": "\\boxed{" + "".join(f"(a+b+c+{n})" for n in range(30)) + "}",
    "nested fractions": "\\frac{1}{" * 60,
    "python power": "9**9**9",
    "digits": "9" * 100_000,
    "parentheses": "(" * 100_000,
    "spaces": " " * 100_000,
    "dollars": "$" * 10_000,
    "boxes": "\\boxed{" * 5_000,
    "hedging in one box": "\\boxed{x^2+2x+1, x^2, x, 1, 2}",
    "hedging in two boxes": "\\boxed{x^2+2x+1} or \\boxed{x^2}",
    "nan": "nan",
    "surrogates": "\\boxed{\ud800\x00}",
}

TEXTS = {
    "silence": "",
    "a space": " ",
    "brackets": "[" * 100_000,
    "stars": "*a" * 50_000,
    "quotes": "\"'" * 50_000,
    "dots": "." * 100_000,
    "line ends": "\n" * 100_000,
    "tags": "<i>" * 30_000 + "<think>" * 10_000,
    "surrogates": "\ud800\x00",
}

SQL = {
    "endless recursion": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    "SELECT count(*) FROM c",
    "doubling text": "WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) "
    "SELECT max(x) FROM c",
    "sorted blobs": "WITH RECURSIVE c(x) AS (SELECT zeroblob(19000) UNION ALL SELECT x FROM c) "
    "SELECT x FROM c ORDER BY x",
    "gigabyte": "SELECT zeroblob(1000000000)",
    "attach": "ATTACH DATABASE '/tmp/x.db' AS x",
    "vacuum into": "VACUUM INTO '/tmp/x.db'",
    "pragma": "PRAGMA hard_heap_limit = 0",
    "extension": "SELECT load_extension('/tmp/x.so')",
    "like": "SELECT '" + "a" * 19_000 + "' LIKE '" + "%a" * 24 + "b'",
    "deep": "SELECT " + "(" * 5_000 + "1",
}

TOOL_CALLS = {
    **{
        f"SQL: {name}": {"name": "sql", "arguments": {"statement": text}}
        for name, text in SQL.items()
    },
    "no such tool": {"name": "shell", "arguments": {"command": "true"}},
    "arguments of another kind": {"name": "sql", "arguments": ["SELECT 1"]},
    "long arguments": {"name": "sql", "arguments": {"statement": "x" * 100_000}},
    "no call": {},
}
