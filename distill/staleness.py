"""How old the tokens of rollouts are, in versions of the weights, and which are too old."""

from collections.abc import Callable, Iterable

from posttrain.rollout.types import Rollout

Learned = Callable[[Rollout], slice]
"""Which tokens of a rollout's response are learned."""


def whole(rollout: Rollout) -> slice:
    """A `Learned`: all of it."""
    return slice(0, len(rollout.response))


def fresh_from(rollout: Rollout, oldest: int) -> int:
    """Where the tokens begin that version `oldest` or a later one sampled: a rollout goes on under
    newer weights alone. 0 of a teacher's answer, which no version sampled."""
    if rollout.sampled_by:
        return 0
    return sum(version < oldest for version in rollout.token_versions)


def describe_staleness(
    rollouts: Iterable[Rollout], *, version: int, learned: Learned
) -> dict[str, float]:
    """`staleness` and `staleness_max`: the mean and the largest age of the own tokens that the
    learner's `version` learns; `stale_tokens`: how many it would learn too, but for their age."""
    ages: list[int] = []
    num_stale = 0
    for rollout in rollouts:
        kept = learned(rollout)
        num_stale += sum(rollout.is_own[: min(kept.start, kept.stop)])
        pairs = zip(rollout.token_versions[kept], rollout.is_own[kept], strict=True)
        ages += [version - sampled_by for sampled_by, own in pairs if own]
    return {
        "staleness": sum(ages) / max(len(ages), 1),
        "staleness_max": max(ages, default=0),
        "stale_tokens": num_stale,
    }
