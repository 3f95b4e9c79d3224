"""Multi-token prediction, depth 1 (V3 report 2.2; V4 keeps it): one more block that, at token t,
reads token t + 1 and predicts token t + 2.

    u = e_proj(enorm(embed(token t+1))) + h_proj(hnorm(x_t)), for each of the N streams
    p(token t+2) = softmax(head(norm(hc_head(block(u)))))

What it takes is the backbone's N streams as the last layer leaves them, *before* the hyper head
and the final norm: hnorm normalises each stream of H channels on its own, one h_proj serves all N,
and the embedding is added to each (official inference code of V4, `inference/model.py`, class
`MTPBlock`, whose input is [b, s, hc, d]; serving engines keep this state beside the logits). Its
attention is sliding (the 44th of Flash's compress_ratios is 0), its gate is scored, never hashed;
hyper head and norm are its own, embedding and output head are the backbone's.

Legend: T tokens, N streams, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deepseek_v4 import DeepseekV4Config

from posttrain.backbone.attention import Context
from posttrain.backbone.auxiliary import attach
from posttrain.backbone.balance import LoadMeter
from posttrain.backbone.decode import DecodeContext
from posttrain.backbone.fake_quant import round_inputs
from posttrain.backbone.hyper_connections import V4HyperHead
from posttrain.backbone.layer import V4DecoderLayer
from posttrain.backbone.norm import V4RMSNorm
from posttrain.backbone.routing import RouteTape

if TYPE_CHECKING:
    from posttrain.backbone.model import V4Model  # which is made with this module's block


def mtp_config(config: DeepseekV4Config) -> DeepseekV4Config:
    """The configuration of the block as a model of one layer: what its cache is made from."""
    one = copy.deepcopy(config)
    one.update(
        {
            "num_hidden_layers": 1,
            "layer_types": ["sliding_attention"],
            "mlp_layer_types": ["moe"],
        }
    )
    return one


class V4MTPBlock(V4DecoderLayer):
    """`mtp.0` of an official checkpoint: a decoder layer's names, and eight of its own."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(mtp_config(config), layer_idx=0)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = nn.Linear(size, size, bias=False)
        self.h_proj = nn.Linear(size, size, bias=False)
        self.enorm = V4RMSNorm(size, eps=eps)
        self.hnorm = V4RMSNorm(size, eps=eps)
        self.norm = V4RMSNorm(size, eps=eps)
        self.hc_head = V4HyperHead(config)
        self.load_meter: LoadMeter | None = None
        """Counts how many tokens go to each expert in training (balance.BalanceExperts)."""
        round_inputs(self, config)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x_TNH: Tensor,
        embed_TH: Tensor,
        context: Context | DecodeContext,
        *,
        tape: RouteTape | None = None,
    ) -> Tensor:
        """Hidden states (T, H), normalised, from which the shared head predicts token t + 2.

        Args:
            x_TNH: the backbone's last streams at token t; detached, the block learns alone.
            embed_TH: the shared embedding of token t + 1.
            context: of a forward over the same tokens, with a cache of `mtp_config`'s if any; token
                t keeps its position. Its tape is of the backbone's layers alone.
            tape: takes down the block's own experts, a single layer's.
        """
        if isinstance(context, Context):
            context = dataclasses.replace(context, tape=tape)
        joined_TNH = self.e_proj(self.enorm(embed_TH)).unsqueeze(1) + self.h_proj(self.hnorm(x_TNH))
        no_ids = torch.zeros(len(x_TNH), dtype=torch.long, device=x_TNH.device)
        out_TNH = super().forward(joined_TNH, no_ids, context)
        return self.norm(self.hc_head(out_TNH.unsqueeze(0)).squeeze(0))


def ahead(x_T: Tensor, document_T: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """x of the token `places` on, and whether that token is of the same document, each (T,). Where
    it is not, the value is some other token's."""
    place_T = torch.arange(len(x_T), device=x_T.device)
    is_same_T = (document_T.roll(-places) == document_T) & (place_T < len(x_T) - places)
    return x_T.roll(-places), is_same_T


def mtp_loss(
    block: V4MTPBlock,
    x_TNH: Tensor,
    token_id_T: Tensor,
    weight_T: Tensor,
    context: Context,
    *,
    embedding: nn.Module,
    head_VH: Tensor,
    tape: RouteTape | None = None,
) -> Tensor:
    """The weighted sum of -log p(token t + 2), a scalar in float32 (V3 report eqs. 24-25).

    A document's last two tokens predict nothing: no token of another document is read or foretold.

    Args:
        x_TNH: the backbone's last streams.
        token_id_T: the real tokens, flat.
        weight_T: each token's weight as a target, as in the main loss: the loss's share (V4: 0.3,
            then 0.1 once the learning rate decays) over the number of target tokens in the global
            batch; 0 for a prompt's.
        context: of the forward that gave x.
        embedding: the backbone's, ids to (T, H).
        head_VH: the output head's weight.
        tape: takes down the block's experts.
    """
    documents = context.documents
    next_T, has_next_T = ahead(token_id_T, documents.document_T, 1)
    target_T, has_target_T = ahead(token_id_T, documents.document_T, 2)
    # a document's last token reads nothing: its experts count, and learn by the balance loss
    embed_TH = embedding(next_T).masked_fill(~has_next_T[:, None], 0.0)
    hidden_TH = block(x_TNH, embed_TH, context, tape=tape)
    weight_T = weight_T.roll(-2) * has_target_T
    slot_N = weight_T.nonzero().squeeze(1)
    return weighted_cross_entropy(hidden_TH[slot_N], head_VH, target_T[slot_N], weight_T[slot_N])


def attach_mtp(
    hidden_TH: Tensor,
    x_TNH: Tensor,
    token_id_T: Tensor | None,
    context: Context,
    *,
    model: Any,
    scale: float | Tensor,
) -> Tensor:
    """The backbone's hidden states, in whose backward a V4ForCausalLM's block, its embedding, its
    head and its backbone learn `scale` times the mean of `mtp_loss` over all tokens that a document
    has two places on.

    All: the base model is not told which tokens a trainer's own loss leaves out, so a prompt's are
    targets too. For other weights call `mtp_loss`.

    Raises:
        ValueError: the model has no block, or a batch of embeddings no ids.
    """
    remedy = f"config.mtp_loss_weight is {model.config.mtp_loss_weight}, set it to 0 to do without"
    if not hasattr(model, "mtp"):
        raise ValueError(f"the model has no block: with_mtp=True, or mtp.add_mtp(model); {remedy}")
    if token_id_T is None:
        raise ValueError(f"give input_ids beside inputs_embeds: they are foretold; {remedy}")
    _, has_target_T = ahead(token_id_T, context.documents.document_T, 2)
    block: V4MTPBlock = model.mtp[0]
    meter = block.load_meter
    tape = RouteTape(1) if meter is not None else None
    loss = mtp_loss(
        block,
        x_TNH,
        token_id_T,
        (1 / has_target_T.sum().clamp(min=1)).expand(len(token_id_T)),
        context,
        embedding=model.get_input_embeddings(),
        head_VH=model.get_output_embeddings().weight,
        tape=tape,
    )
    if meter is not None and tape is not None:
        meter.add(tape.choices, model.config.n_routed_experts)
    return attach(hidden_TH, [loss], scale)


def weighted_cross_entropy(
    hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor, rows_at_once: int = 1024
) -> Tensor:
    """sum_n weight_n * -log softmax(head hidden_n)[target_n]; logits of `rows_at_once` tokens in
    memory at a time, in backward too."""
    parts = [
        checkpoint(_cross_entropy, rows, head_VH, target, weight, use_reentrant=False)
        for rows, target, weight in zip(
            hidden_NH.split(rows_at_once),
            target_N.split(rows_at_once),
            weight_N.split(rows_at_once),
            strict=True,
        )
    ]
    return torch.stack(parts).sum()


def _cross_entropy(hidden_NH: Tensor, head_VH: Tensor, target_N: Tensor, weight_N: Tensor) -> Any:
    logits_NV = F.linear(hidden_NH, head_VH)
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(wide, target_N, reduction="none") @ weight_N.to(wide.dtype)


@dataclass(frozen=True)
class Observed:
    """A forward of the backbone, and what the block needs of it."""

    hidden_BSH: Tensor
    """The backbone's own last hidden states."""
    x_TNH: Tensor
    """The streams of the real tokens that its last layer leaves."""
    context: Context


def observe(base: V4Model, ids_BS: Tensor, **batch: Any) -> Observed:
    """`base(ids_BS, **batch)`, from which both the main loss and `mtp_loss` are made."""
    seen: dict[str, Any] = {}

    def keep_streams(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["x_TNH"] = args[0].squeeze(0)

    def keep_context(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["context"] = kwargs["context"]

    hooks = (
        base.hc_head.register_forward_pre_hook(keep_streams),
        base.layers[0].register_forward_pre_hook(keep_context, with_kwargs=True),
    )
    try:
        hidden = base(ids_BS, **batch).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return Observed(hidden, seen["x_TNH"], seen["context"])


def add_mtp(model: Any) -> V4MTPBlock:
    """A fresh block as `model.mtp[0]` with its initial values, on the model's device, in its dtype
    (what V4 keeps in float32 stays there). It can learn, by `mtp_loss` too."""
    with torch.device(model.device):
        block = V4MTPBlock(model.config)
    kept = set(model._keep_in_fp32_modules_strict)
    for module in block.modules():
        model._init_weights(module)
    for name, parameter in block.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(model.dtype)
    model.mtp, model.config.with_mtp = nn.ModuleList([block]), True
    return block
