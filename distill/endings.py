"""How rollouts end, on their own, out of tokens or in a loop, and what is learned of them.

A response ends in a loop if its last `window` tokens repeat a pattern of at most a quarter of them:
each equals the one a period before it. Tools' tokens count, since an agent may loop by its calls.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from posttrain.rollout.types import Rollout

Until = Callable[[Rollout], int]
"""How many tokens of a rollout's response are learned from, from the first on."""


def loop_start(response: Sequence[int], window: int) -> int | None:
    """Where a response that ends in a loop begins to repeat: 3 of [7, 8, 9, 8, 9, 8, 9, ...], which
    has gone through the loop once by then. None where it ends in none."""
    for period in range(1, window // 4 + 1):
        start = len(response)
        while start > period and response[start - 1] == response[start - 1 - period]:
            start -= 1
        if len(response) - start >= window - period:
            return start
    return None


def learned_until(
    rollout: Rollout,
    *,
    looped: Literal["keep", "mask", "drop"],
    truncated: Literal["keep", "drop"],
    loop_window: int,
) -> int:
    """An `Until`: 0 for what is dropped, and where a loop begins to repeat for what is masked."""
    if truncated == "drop" and rollout.finish_reason == "length":
        return 0
    start = None if looped == "keep" else loop_start(rollout.response, loop_window)
    if start is None:
        return len(rollout.response)
    return 0 if looped == "drop" else start


def describe_endings(
    rollouts: Iterable[Rollout], *, until: Until, loop_window: int
) -> dict[str, float]:
    """`truncated/<domain>`: share of the rollouts that max_new_tokens cut; `looped/<domain>`: that
    end in a loop; `masked_tokens/<domain>`: own tokens that are left out for their rollout's
    ending; `dropped/<domain>`: rollouts all of whose are."""
    by_domain: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_domain[rollout.domain].append(rollout)
    numbers: dict[str, float] = {}
    for domain, group in by_domain.items():
        is_cut = [r.finish_reason == "length" for r in group]
        is_looped = [loop_start(r.response, loop_window) is not None for r in group]
        numbers[f"truncated/{domain}"] = sum(is_cut) / len(group)
        numbers[f"looped/{domain}"] = sum(is_looped) / len(group)
        numbers[f"masked_tokens/{domain}"] = sum(sum(r.is_own[until(r) :]) for r in group)
        numbers[f"dropped/{domain}"] = sum(any(r.is_own) and until(r) == 0 for r in group)
    return numbers
