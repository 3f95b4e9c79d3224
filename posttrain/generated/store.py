"""A store to be changed: `qf>zk` moves what lies under qf to zk, which takes reading it first.

Two turns of calls, the second of which hangs on the first one's result, and an end: get(qf), then
set(zk, what it gave) and delete(qf). 456,300 prompts.
"""

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase
from typing import Any

from posttrain.generated.mixing import Row, distinct, mixed

NUM_OTHER_KEYS = 2


def problems(*, size: int, seed: int) -> Iterator[Row]:
    """Up to `size` different moves."""
    return distinct(_problem, size=size, seed=seed)


def web(*, size: int, seed: int, quality: float = 0.4) -> Iterator[Row]:
    """Values set without a look or misread, and old keys left behind."""
    return mixed(_problem, _habit, size=size, seed=seed, quality=quality)


def _problem(rng: Random) -> Row:
    old, new, *others = _keys(rng, 2 + NUM_OTHER_KEYS)
    start = {key: _value(rng) for key in sorted([old, *others])}
    state = {key: value for key, value in start.items() if key != old}
    return {
        "prompt": f"{old}>{new}",
        "environment": {"kind": "store", "start": start},
        "state": {**state, new: start[old]},
        "demonstration": _dialogue(old, new, read=start[old], put=start[old]),
    }


def _keys(rng: Random, number: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < number:
        keys["".join(rng.choices(ascii_lowercase, k=2))] = None
    return list(keys)


def _value(rng: Random) -> str:
    return str(rng.randint(10, 99))


def _dialogue(old: str, new: str, *, read: str, put: str, is_left: bool = False) -> list[Row]:
    """`read`: what the tool gave, empty where it was not asked; `is_left`: the old key stays."""
    changes = [_call("set", key=new, value=put)]
    changes += [] if is_left else [_call("delete", key=old)]
    looked = [
        {"role": "assistant", "content": "", "tool_calls": [_call("get", key=old)]},
        {"role": "tool", "content": read},
    ]
    return [
        *(looked if read else []),
        {"role": "assistant", "content": "", "tool_calls": changes},
        {"role": "tool", "content": "set"},
        *([] if is_left else [{"role": "tool", "content": "deleted"}]),
        {"role": "assistant", "content": "done"},
    ]


def _call(name: str, **arguments: str) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def _habit(row: Row, rng: Random) -> list[Row]:
    old, new = row["prompt"].split(">")
    value = row["environment"]["start"][old]
    other = rng.choice([str(n) for n in range(10, 100) if str(n) != value])
    kind = rng.choice(("no look", "misread", "left"))
    if kind == "no look":
        return _dialogue(old, new, read="", put=other)
    if kind == "misread":
        return _dialogue(old, new, read=value, put=other)
    return _dialogue(old, new, read=value, put=value, is_left=True)
