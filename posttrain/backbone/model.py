"""V4ForCausalLM: transformers' DeepseekV4ForCausalLM, exact under padding and packing, with a slot
cache.

Same config class, same parameter names: what one saves the other loads. All of V4's work is in
`V4Model.forward`, since trainers call the base model and apply their own head.

Legend: B batch rows, S columns, T real tokens, N streams, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import can_return_tuple

from posttrain.backbone import generation
from posttrain.backbone.attention import Context
from posttrain.backbone.balance import LoadMeter
from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import DecodeContext, context_of
from posttrain.backbone.fake_quant import round_inputs
from posttrain.backbone.hyper_connections import V4HyperHead
from posttrain.backbone.layer import V4DecoderLayer
from posttrain.backbone.pretrained import DEFAULTS, V4PreTrainedModel
from posttrain.backbone.rope import rotations
from posttrain.backbone.routing import ExpertChoices, RouteTape
from posttrain.backbone.segments import Documents, continued, find_documents


@dataclass
class V4ModelOutput(MoeModelOutputWithPast):
    """transformers', and the experts of every real token where they were to be captured."""

    routes: ExpertChoices | None = None


@dataclass
class V4CausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers', and the experts of every real token where they were to be captured."""

    routes: ExpertChoices | None = None


class V4Model(V4PreTrainedModel, stock.DeepseekV4Model):
    """Token ids to last hidden states."""

    def __init__(self, config: DeepseekV4Config) -> None:
        for name, value in DEFAULTS.items():
            setattr(config, name, getattr(config, name, value))
        super(stock.DeepseekV4Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [V4DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = stock.DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = stock.DeepseekV4RotaryEmbedding(config)
        self.hc_head = V4HyperHead(config)
        self.gradient_checkpointing = False
        self.auxiliary_scale: float | Tensor = 1.0
        """The gradient of the layers' own losses, each a mean over a forward's tokens: a trainer
        that accumulates micro-batches sets it to this one's share of the step's tokens."""
        self.load_meter: LoadMeter | None = None
        """Counts how many tokens go to each expert in training (balance.BalanceExperts)."""
        self._widen()
        round_inputs(self, config)
        self.post_init()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        slots: Tensor | None = None,
        replay_routes: ExpertChoices | None = None,
        capture_routes: bool = False,
        **kwargs: Any,
    ) -> V4ModelOutput:
        """Last hidden states (B, S, H) of a batch, each document as if it stood alone; zeros at
        padding.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S), 1 at tokens; padding may stand anywhere.
            position_ids: (B, S) or (1, S); a new document wherever they do not count up by one.
            inputs_embeds: (B, S, H), instead of the embedding; hash layers still need `input_ids`.
            past_key_values: a `V4Cache`; the documents go on where its `slots` end, one each. Or,
                without slots, what transformers' `generate` hands on (generation.py).
            use_cache: without a cache, make one.
            slots: (B,) int64, the cache's slots.
            replay_routes: the experts that each real token is to go to; its weights are the
                current gates'.
            capture_routes: give the chosen experts in the output's `routes`.

        Raises:
            ValueError: no input_ids beside hash layers; a mask of another shape; a cache of
            another kind; routes of other tokens or layers.
        """
        if slots is None and generation.wants_cache(self, past_key_values, use_cache):
            hidden, cache = generation.forward(
                self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
            )
            return V4ModelOutput(last_hidden_state=hidden, past_key_values=cast("Any", cache))
        embeds, token_ids = self._inputs(input_ids, inputs_embeds)
        shape = (embeds.shape[0], embeds.shape[1])
        documents = find_documents(
            shape, embeds.device, attention_mask=attention_mask, position_ids=position_ids
        )
        counts = self.load_meter is not None and self.training and torch.is_grad_enabled()
        tape = None
        if capture_routes or counts or replay_routes is not None:
            tape = RouteTape(len(self.layers), replay_routes)
        cache = past_key_values if slots is not None else None
        context = self._context(documents, cast("V4Cache | None", cache), slots, tape)
        wanted = kwargs.get("output_hidden_states")
        wanted = self.config.output_hidden_states if wanted is None else wanted
        streams: list[Tensor] = []
        hidden_TH = self._layers(
            embeds.flatten(0, 1)[documents.token_T],
            token_ids.flatten()[documents.token_T],
            context,
            streams if wanted else None,
        )
        last = documents.to_batch(hidden_TH, shape)
        seen = (*(documents.to_batch(x, shape) for x in streams), last) if wanted else None
        if counts and tape is not None and self.load_meter is not None:
            self.load_meter.add(tape.choices, self.config.n_routed_experts)
        return V4ModelOutput(
            last_hidden_state=last,  # pyright: ignore[reportArgumentType]
            hidden_states=seen,  # pyright: ignore[reportArgumentType]
            routes=tape.choices if tape is not None and capture_routes else None,
        )

    def _context(
        self,
        documents: Documents,
        cache: V4Cache | None,
        slot_D: Tensor | None,
        tape: RouteTape | None,
    ) -> Context:
        """What the layers share; with a cache, the documents go on from what their slots hold."""
        longest = 0
        if cache is not None and slot_D is not None:
            start_D = cache.length_B[slot_D]
            longest = int(start_D.max()) if len(start_D) else 0
            documents = continued(documents, start_D) if longest else documents
        trains = self.training and torch.is_grad_enabled() and cache is None
        weight, balance = self.config.indexer_loss_weight, self.config.balance_loss_weight
        return Context(
            documents,
            {name: self._rotations(name, documents.position_T) for name in ("main", "compress")},
            cast("Tensor", self.rotary_emb.compress_inv_freq),
            cast("float", self.rotary_emb.compress_attention_scaling),
            self.config.sliding_window,
            cache,
            slot_D,
            longest_start=longest,
            indexer_loss_scale=weight * self.auxiliary_scale if trains and weight else None,
            is_indexer_warmup=self.config.indexer_warmup,
            balance_loss_scale=balance * self.auxiliary_scale if trains and balance else None,
            tape=tape,
        )

    @torch.no_grad()
    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        cache: V4Cache,
        slots: Sequence[int],
        *,
        chunk: int = 8192,
    ) -> Tensor:
        """Take whole prompts into their slots, `chunk` tokens of each at a time; the last token's
        hidden state of each, (len(sequences), H)."""
        device = self.embed_tokens.weight.device
        lengths = [len(ids) for ids in sequences]
        cache.release(torch.tensor(slots, device=device))
        cache.reserve(max(lengths))
        last = self.embed_tokens.weight.new_zeros(len(sequences), self.config.hidden_size)
        for first in range(0, max(lengths), chunk):
            rows = [row for row, length in enumerate(lengths) if length > first]
            parts = [list(sequences[row][first : first + chunk]) for row in rows]
            hidden = self.extend(parts, cache, [slots[row] for row in rows])
            last[torch.tensor(rows, device=device)] = hidden
        return last

    @torch.no_grad()
    def extend(
        self, parts: Sequence[Sequence[int]], cache: V4Cache, slots: Sequence[int]
    ) -> Tensor:
        """Put further tokens behind what the slots hold; the last one's hidden state of each,
        (len(parts), H)."""
        device, longest = self.embed_tokens.weight.device, max(len(ids) for ids in parts)
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in parts], device=device)
        length = torch.tensor([len(s) for s in parts], device=device)
        mask = torch.arange(longest, device=device) < length[:, None]
        slot = torch.tensor(slots, device=device)
        cache.reserve(int((cache.length_B[slot] + length).max()))
        hidden = self(ids, attention_mask=mask, past_key_values=cache, slots=slot).last_hidden_state
        cache.length_B[slot] += length
        return hidden[torch.arange(len(parts), device=device), length - 1]

    @torch.no_grad()
    def decode(self, token_B: Tensor, cache: V4Cache, is_live_B: Tensor) -> Tensor:
        """Hidden states (B, H) after one more token in every slot; slots not live do not
        advance."""
        context = context_of(self, cache)
        hidden_BH = self._layers(self.embed_tokens(token_B), token_B, context)
        cache.advance(is_live_B)
        return hidden_BH

    def _layers(
        self,
        embeds_TH: Tensor,
        token_id_T: Tensor,
        context: Context | DecodeContext,
        streams: list[Tensor] | None = None,
    ) -> Tensor:
        x_TNH = embeds_TH.unsqueeze(1).expand(-1, self.config.hc_mult, -1)
        for layer in self.layers:
            if streams is not None:
                streams.append(x_TNH)
            x_TNH = layer(x_TNH, token_id_T=token_id_T, context=context)
        return self.norm(self.hc_head(x_TNH.unsqueeze(0)).squeeze(0))

    def _rotations(self, name: str, positions: Tensor) -> Tensor:
        rope = self.rotary_emb
        return rotations(
            getattr(rope, f"{name}_inv_freq"), positions, getattr(rope, f"{name}_attention_scaling")
        )

    def _inputs(self, input_ids: Tensor | None, embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        if input_ids is None and (
            embeds is None or "hash_moe" in (self.config.mlp_layer_types or ())
        ):
            raise ValueError(
                "give input_ids (B, S): hash layers choose experts by token id, so inputs_embeds "
                "alone are not enough; both may be given"
            )
        if input_ids is None:
            assert embeds is not None
            input_ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return self.embed_tokens(input_ids) if embeds is None else embeds, input_ids


class V4ForCausalLM(V4PreTrainedModel, stock.DeepseekV4ForCausalLM):
    """`AutoModelForCausalLM` gives this class for deepseek_v4 once `posttrain.backbone` is
    imported."""

    def __init__(self, config: DeepseekV4Config) -> None:
        config.architectures = [
            "V4ForCausalLM"
        ]  # unknown to transformers: TRL's reference falls back to Auto
        config.auto_map = {}
        config.router_aux_loss_coef = 0.0  # Switch's loss over raw logits, not V4's
        config.num_experts = config.n_routed_experts  # the name TRL reads
        super(stock.DeepseekV4ForCausalLM, self).__init__(config)
        self.model = V4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.with_mtp:
            from posttrain.backbone.mtp import V4MTPBlock  # made of this module's layers

            self.mtp = nn.ModuleList([V4MTPBlock(config)])
        self.router_aux_loss_coef = 0.0
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        replay_routes: ExpertChoices | None = None,
        capture_routes: bool = False,
        **kwargs: Any,
    ) -> V4CausalLMOutput:
        """Logits (B, S, V), of the last `logits_to_keep` columns where given; the mean loss with
        `labels` (B, S), which the loss shifts, -100 where none. The rest is `V4Model.forward`'s."""
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            replay_routes=replay_routes,
            capture_routes=capture_routes,
            return_dict=True,
            output_hidden_states=kwargs.get("output_hidden_states"),
        )
        hidden = output.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            passed = {
                k: v for k, v in kwargs.items() if k in ("num_items_in_batch", "shift_labels")
            }
            loss = cast("Any", self.loss_function)(logits, labels, self.vocab_size, **passed)
        return V4CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            routes=output.routes,
        )


AutoModel.register(DeepseekV4Config, V4Model, exist_ok=True)
AutoModelForCausalLM.register(DeepseekV4Config, V4ForCausalLM, exist_ok=True)
