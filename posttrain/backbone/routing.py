"""Which experts a token goes to, and how much of each (V4 report 2.1); taken down, and given back.

    s = sqrt(softplus(W x));  chosen = top-k of s + bias, or table[token];
    weight_j = scaling * s_j / sum over chosen of s

The bias chooses and never weighs. Scores are float32 whatever the model's dtype: bf16 logits
change the chosen set of 6-15% of the tokens. RL replays the experts that the sampler chose, hash
layers included; their weights then come from the current gate, which goes on learning.

Legend: T tokens, H hidden size, E experts, k experts a token, L layers, B batch rows, S columns, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import maybe_autocast

from posttrain.backbone.segments import Documents

LOWEST_LOGIT = -80.0
"""sqrt(softplus(-80)) is 4e-18, nothing among scores; below -104 softplus is 0 in float32 and the
square root's gradient would be inf * 0."""


@dataclass(frozen=True, slots=True)
class Routes:
    """One layer's choice for T tokens: `Routes([[2, 0]], [[.9, .6]], [[.5, .1, .75]])`."""

    expert_Tk: Tensor
    """int64, the best first (a table's order in a hash layer); equal scores: the lowest index."""
    weight_Tk: Tensor
    """What each expert's output is multiplied by; sums to the routed scaling."""
    score_TE: Tensor
    """sqrt-softplus scores before bias, float32 or wider, in the gate's graph."""


def route(
    gate: Any, x_TH: Tensor, token_id_T: Tensor, *, is_hash: bool, replay_Tk: Tensor | None = None
) -> Routes:
    """The experts of each token.

    Args:
        gate: a stock `DeepseekV4TopKRouter`, or a `DeepseekV4HashRouter` where `is_hash`.
        x_TH: normalised hidden states, any dtype.
        token_id_T: int64, read by hash layers alone.
        replay_Tk: experts to use instead, any integer dtype; a row of -1 lets the gate choose.

    Raises:
        ValueError: `replay_Tk` of another shape.
    """
    score_TE = scores(gate, x_TH)
    expert_Tk = told(gate, token_id_T, len(x_TH), is_hash=is_hash, replay_Tk=replay_Tk)
    if not is_hash:
        own_Tk = top_k(_selection(gate, score_TE), gate.top_k)
        expert_Tk = own_Tk if expert_Tk is None else torch.where(expert_Tk >= 0, expert_Tk, own_Tk)
    assert expert_Tk is not None
    chosen_Tk = score_TE.gather(1, expert_Tk)
    share_Tk = chosen_Tk / (chosen_Tk.sum(dim=-1, keepdim=True) + 1e-20)
    return Routes(expert_Tk, share_Tk * gate.routed_scaling_factor, score_TE)


def told(
    gate: Any, token_id_T: Tensor, num_tokens: int, *, is_hash: bool, replay_Tk: Tensor | None
) -> Tensor | None:
    """Experts (T, k) int64 that tokens go to whatever their scores, -1 where the gate is to choose;
    None: it chooses all. `route` says what is what, and raises."""
    shape = num_tokens, gate.top_k
    if replay_Tk is not None:
        if replay_Tk.shape != shape:
            raise ValueError(
                f"replay_Tk is {tuple(replay_Tk.shape)}, this layer has (tokens, experts a token) "
                f"= {shape}: replay the routes of the same real tokens, in order"
            )
        replay_Tk = replay_Tk.to(token_id_T)
    if not is_hash:
        return replay_Tk
    table_Tk = gate.tid2eid[token_id_T].long()
    return table_Tk if replay_Tk is None else torch.where(replay_Tk >= 0, replay_Tk, table_Tk)


def scores(gate: Any, x_TH: Tensor) -> Tensor:
    """sqrt(softplus(W x)), (T, E), in float32 (float64 for float64), under autocast too."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    with maybe_autocast(device_type=x_TH.device.type, enabled=False):
        logits = F.linear(x_TH.to(dtype), gate.weight.to(dtype))
    return gate.score_fn(logits.clamp(min=LOWEST_LOGIT))


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """The k highest of each row, best first, the lowest index among equals, (T, k) int64.

    argmax returns the first of several maxima, which topk does not promise; k passes over 256
    experts cost what topk does and a fifth of a stable sort."""
    left_TE = score_TE.detach().clone()
    best: list[Tensor] = []
    for _ in range(k):
        best.append(left_TE.argmax(dim=-1, keepdim=True))
        left_TE.scatter_(1, best[-1], float("-inf"))
    return torch.cat(best, dim=1)


def margin(gate: Any, score_TE: Tensor, *, is_hash: bool) -> Tensor:
    """By how much the last chosen expert beat the first that was not, (T,); inf in a hash layer
    and where all are chosen. Under 1e-5 rounding may choose otherwise."""
    if is_hash or gate.top_k == score_TE.shape[1]:
        return torch.full_like(score_TE[:, 0], float("inf")).detach()
    best_TK = _selection(gate, score_TE).topk(gate.top_k + 1, dim=-1).values
    return best_TK[:, -2] - best_TK[:, -1]


def _selection(gate: Any, score_TE: Tensor) -> Tensor:
    return score_TE.detach() + gate.e_score_correction_bias.to(score_TE.dtype)


@dataclass(frozen=True, slots=True)
class ExpertChoices:
    """The experts of all layers for a batch's T real tokens: two layers, one token, top-2 is
    `ExpertChoices(expert_LTk=[[[2, 0]], [[1, 3]]])`."""

    expert_LTk: Tensor
    """Integer; -1 where it is not known (a sampler never runs the last token it drew)."""
    is_close_T: Tensor | None = None
    """True for tokens that rounding may route otherwise in some layer: two scores were less than
    1e-5 apart. None where that is not known."""

    def to_batch(self, documents: Documents, shape: tuple[int, int]) -> Tensor:
        """(B, S, L, k) int16 in the caller's layout; -1 at padding."""
        expert_TLk = self.expert_LTk.transpose(0, 1).to(torch.int16)
        return documents.to_batch(expert_TLk + 1, shape) - 1

    @classmethod
    def from_batch(cls, expert_BSLk: Tensor, documents: Documents) -> ExpertChoices:
        """From (B, S, L, k): the real tokens' alone."""
        expert_TLk = expert_BSLk.flatten(0, 1)[documents.token_T.to(expert_BSLk.device)]
        return cls(expert_TLk.transpose(0, 1).to(documents.token_T.device))


class RouteTape:
    """What one forward's layers choose, or must choose.

    A layer writes its first pass alone: gradient checkpointing runs it again in the backward pass.
    """

    def __init__(self, num_layers: int, replay: ExpertChoices | None = None) -> None:
        """Raises ValueError: `replay` of another number of layers."""
        if replay is not None and len(replay.expert_LTk) != num_layers:
            raise ValueError(
                f"replayed routes have {len(replay.expert_LTk)} layers, the model {num_layers}: "
                "capture every layer, those that route by hash too"
            )
        self.replayed = replay
        self._num_layers = num_layers
        self._expert_Tk: list[Tensor | None] = [None] * num_layers
        self._margin_T: list[Tensor | None] = [None] * num_layers
        self._row_T: Tensor | None = None
        self._num_rows = 0
        self._found: ExpertChoices | None = None
        self._parts: list[tuple[Tensor, RouteTape]] = []

    def of_rows(self, is_real_B: Tensor) -> RouteTape:
        """This tape, for a forward over B rows of which these alone are tokens (a decode step's
        live slots).

        Raises ValueError: the tape holds a forward, or replays another number of tokens."""
        if self._found is not None or self._parts or self._expert_Tk[0] is not None:
            raise ValueError("a RouteTape takes one call: make a new one for each decode step")
        self._row_T = is_real_B.nonzero().squeeze(1)
        if self.replayed is not None and self.replayed.expert_LTk.shape[1] != len(self._row_T):
            raise ValueError(
                f"replayed routes are of {self.replayed.expert_LTk.shape[1]} tokens, the step has "
                f"{len(self._row_T)} live slots of {len(is_real_B)}: give those of the live slots"
            )
        self._num_rows = len(is_real_B)
        return self

    def part(self, token_X: Tensor) -> RouteTape:
        """A tape for a forward over these of the tokens alone; its routes become theirs here."""
        replay = self.replayed
        if replay is not None:
            replay = ExpertChoices(replay.expert_LTk[:, token_X.to(replay.expert_LTk.device)])
        part = RouteTape(self._num_layers, replay)
        self._parts.append((token_X, part))
        return part

    def put(self, choices: ExpertChoices) -> None:
        """What a forward that had a tape of its own gave as its routes."""
        self._found = choices

    def replay(self, layer: int) -> Tensor | None:
        """What `route` takes as `replay_Tk`."""
        if self.replayed is None or self._row_T is None:
            return None if self.replayed is None else self.replayed.expert_LTk[layer]
        expert_Tk = self.replayed.expert_LTk[layer].to(self._row_T.device)
        expert_Bk = expert_Tk.new_full((self._num_rows, expert_Tk.shape[1]), -1)
        return expert_Bk.index_copy(0, self._row_T, expert_Tk)

    def record(self, layer: int, gate: Any, routes: Routes, *, is_hash: bool) -> None:
        """Take down a layer's choice."""
        if self._expert_Tk[layer] is None:
            margin_T = margin(gate, routes.score_TE, is_hash=is_hash)
            row_T = slice(None) if self._row_T is None else self._row_T
            self._expert_Tk[layer] = routes.expert_Tk[row_T]
            self._margin_T[layer] = margin_T[row_T]

    @property
    def choices(self) -> ExpertChoices:
        """What was chosen, once every layer has run."""
        if self._found is not None:
            return self._found
        if self._parts:
            return _joined(self._parts)
        expert_LTk = torch.stack(cast("list[Tensor]", self._expert_Tk))
        return ExpertChoices(expert_LTk, self.close_T())

    def close_T(self, below: float = 1e-5) -> Tensor:
        """True for tokens that rounding may route otherwise in some layer, (T,)."""
        return (torch.stack(cast("list[Tensor]", self._margin_T)) < below).any(dim=0)


def _joined(parts: Sequence[tuple[Tensor, RouteTape]]) -> ExpertChoices:
    """The routes of all parts, in the order of their tokens' numbers."""
    order_T = torch.cat([token_X for token_X, _ in parts]).argsort()
    choices = [tape.choices for _, tape in parts]
    expert_LTk = torch.cat([c.expert_LTk for c in choices], dim=1)[:, order_T]
    is_close_T = torch.cat([cast("Tensor", c.is_close_T) for c in choices])[order_T]
    return ExpertChoices(expert_LTk, is_close_T)


def gates(model: nn.Module) -> list[Any]:
    """The stock routers in a model, in layer order, hash layers too."""
    routers = (stock.DeepseekV4TopKRouter, stock.DeepseekV4HashRouter)
    return [module for module in model.modules() if isinstance(module, routers)]


def freeze_routing(model: nn.Module) -> None:
    """No gate weight takes a gradient, and `update_biases` leaves a frozen gate's bias alone; hash
    tables are buffers. For RL: a policy whose experts change under it drifts from its sampler. Call
    before DDP or FSDP wraps the model and before the optimiser is made."""
    for gate in gates(model):
        gate.weight.requires_grad_(False)


def balanced_hash_table(vocab_size: int, top_k: int, num_experts: int) -> Tensor:
    """A `tid2eid` table (V, k) int64: k different experts a token, each expert's share of every
    column equal to one token. Drawn from torch's global generator, as weights are: seeded where
    the model is."""
    token_V = torch.randperm(vocab_size)
    table = torch.empty(vocab_size, top_k, dtype=torch.long)
    for block in token_V.split(num_experts):
        name_E, shift_k = torch.randperm(num_experts), torch.randperm(num_experts)[:top_k]
        table[block] = name_E[(torch.arange(len(block))[:, None] + shift_k) % num_experts]
    return table
