"""What thinking costs: the length reward of an effort (DeepSeek-V4.1)."""

import math

from posttrain.config import Effort
from specialists.config import LengthPenalty

LOWEST = 1
NUMBERS = {"none": LOWEST, "high": 50, "max": 100}


def length_penalty(num_tokens: int, effort: Effort, *, limit: int, config: LengthPenalty) -> float:
    """min(cap, k(b) * num_tokens / limit): what an answer of so many own tokens costs."""
    b = effort if isinstance(effort, int) else NUMBERS[effort]
    k = config.k * math.exp(-(b - LOWEST) / config.tau)
    return min(config.cap, k * num_tokens / limit)
