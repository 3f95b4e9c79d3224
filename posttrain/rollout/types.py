"""What goes into the sampling engine and what comes out. Imports no torch."""
# ruff: noqa: A005  # always imported as posttrain.rollout.types; its folder is never on sys.path

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Said = list[int] | None
"""What a tool or the user says to a turn, as tokens; None: the response ends there."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to sample: `Request("aime-7", [5, 9], stop_token_ids=(2,), domain="math")`."""

    prompt_id: str
    prompt: list[int]
    sample: int = 0
    """Which answer to the prompt, fresh for each new visit: seeds the sampling with prompt_id."""

    max_new_tokens: int = 256
    """Bounds the whole response, the tools' tokens included."""

    pause_at: int = 0
    """The response pauses where it is so long, tools' tokens included, and has not ended; 0: it
    does not."""

    begun: Rollout | None = None
    """A paused answer to go on from, which is read again by the weights of now. Its turn begins
    behind the last token that is not its own."""

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""

    stop_token_ids: tuple[int, ...] = ()
    domain: str = ""

    continue_turn: Callable[[list[int]], Said | Future[Said]] | None = None
    """The turn just finished (own tokens, stop token included) -> tokens to append that are not the
    model's own (a tool's result and the next assistant mark), or None: the response ends. A future
    of these lets the other rows go on while a slow tool works."""

    tells_all_turns: bool = False
    """`continue_turn` gets the own tokens of every turn so far, one behind the other, each turn
    with its stop token: for tools whose answer depends on what was done before."""

    stop_strings: tuple[str, ...] = ()
    """A turn ends with the token that completes one of these in its text."""

    wants_support: bool = False
    """Record what was left to sample from, beside `logp`: `Rollout.kept_logp` and `support`."""

    wants_routes: bool = False
    """Record the experts of every token (V4 models): `Rollout.routes`."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer: `Rollout("aime-7", "math", version=3, prompt=[5, 9], response=[4, 8, 2],
    is_own=[True, False, True], logp=[-0.1, 0.0, -0.7])`."""

    prompt_id: str
    domain: str
    version: int
    """The learner version that sampled its first token; its age is the learner's version less
    this."""

    prompt: list[int]
    response: list[int]
    """With the stop token where one was sampled."""

    is_own: list[bool]
    """False for what a tool or the user said inside the response: such tokens carry no loss."""

    logp: list[float]
    """One per response token: tempered, before top-p/top-k; 0.0 where it is not the model's own."""

    sample: int = 0
    finish_reason: str = "stop"
    """`stop`, `length` where max_new_tokens cut the response, or `paused` at `pause_at`."""

    teacher: str = ""
    """Who reads along where rollouts are distilled, such as "specialist/code"; empty elsewhere."""

    sampled_by: str = ""
    """The teacher that sampled it; empty: the model that learns."""

    versions: list[int] = field(default_factory=list[int])
    """The version that each token was sampled under, where weights changed on the way; else
    empty."""

    stop_string: str = ""
    """The stop string that ended it, if one did."""

    kept_logp: list[float] = field(default_factory=list[float])
    """Like `logp`, of the distribution after top-p and top-k; where `wants_support`."""

    support: list[list[int]] = field(default_factory=list[list[int]])
    """The tokens that top-p and top-k left at each place, ascending; empty where they left all, or
    the token is not the model's own; where `wants_support`."""

    routes: Any = None
    """numpy int16 (prompt + response, layers, experts a token), the last row -1: it was never fed.
    Where `wants_routes`; captured under the version that each token was last fed by."""

    @property
    def token_versions(self) -> list[int]:
        """The version that each token of the response was sampled under."""
        return self.versions or [self.version] * len(self.response)
