"""Whether a step's gradient may change the weights.

A gradient is a spike if it is not finite, or if its norm is above `spike_factor` times the median
norm of the updates before it. Its update is skipped. After `max_skipped` skipped steps in a row the
weights go back to the last checkpoint, once in a run; after as many again the run stops.

Its state is plain values, so that a resumed run decides as a straight one; ranks that see
the same norms decide the same.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

Verdict = Literal["update", "skip", "roll_back", "stop"]
"""The last two skip the update as well."""

WINDOW = 64
"""Updates whose norms the median is taken of."""

MIN_NORMS = 8
"""With fewer norms none is called a spike: the first steps' are the largest."""


class Guard:
    """Judges one step after another."""

    def __init__(self, *, spike_factor: float | None = None, max_skipped: int = 3) -> None:
        """With `spike_factor` None only a gradient that is not finite is a spike."""
        self._spike_factor = spike_factor
        self._max_skipped = max_skipped
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self.num_skipped = 0
        """Of the whole run."""
        self.num_rolled_back = 0
        self.verdict: Verdict = "update"
        """The last one."""

    def judge(self, norm: float) -> Verdict:
        """Of a step with this gradient norm, not finite where its loss was not."""
        self.verdict = self._verdict(norm)
        return self.verdict

    def reason(self, norm: float) -> str:
        """Why an update is skipped, in words."""
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        return f"the gradient's norm is {norm:.3g}, the last updates' median {self._median:.3g}"

    def _verdict(self, norm: float) -> Verdict:
        if not self._is_spike(norm):
            self._norms.append(norm)
            self._in_a_row = 0
            return "update"
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row < self._max_skipped:
            return "skip"
        if self.num_rolled_back:
            return "stop"
        self._in_a_row = 0
        self.num_rolled_back += 1
        return "roll_back"

    def _is_spike(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        if self._spike_factor is None or len(self._norms) < MIN_NORMS:
            return False
        return norm > self._spike_factor * self._median

    @property
    def _median(self) -> float:
        return median(self._norms) if self._norms else math.nan

    def state(self) -> dict[str, Any]:
        """What a resumed run's guard needs."""
        return {
            "norms": list(self._norms),
            "in_a_row": self._in_a_row,
            "num_skipped": self.num_skipped,
            "num_rolled_back": self.num_rolled_back,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._norms.clear()
        self._norms.extend(state["norms"])
        self._in_a_row = state["in_a_row"]
        self.num_skipped = state["num_skipped"]
        self.num_rolled_back = state["num_rolled_back"]
