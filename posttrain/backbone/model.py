"""V4ForCausalLM: transformers' DeepseekV4ForCausalLM, exact under padding and packing, with a slot
cache.

Same config class, same parameter names: what one saves the other loads. All of V4's work is in
`V4Model.forward`, since trainers call the base model and apply their own head.

Legend: B batch rows, S columns, T real tokens, N streams, H hidden size, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock
from transformers.utils.generic import can_return_tuple

from posttrain.backbone import generation
from posttrain.backbone.again import forming
from posttrain.backbone.attention import Context
from posttrain.backbone.auxiliary import join_trainers, step_share
from posttrain.backbone.balance import LoadMeter
from posttrain.backbone.cache import V4Cache
from posttrain.backbone.decode import DecodeContext, context_of
from posttrain.backbone.decode_step import step_hidden
from posttrain.backbone.fake_quant import round_inputs
from posttrain.backbone.hyper_connections import V4HyperHead
from posttrain.backbone.layer import V4DecoderLayer
from posttrain.backbone.mtp import V4MTPBlock, attach_mtp
from posttrain.backbone.norm import V4RMSNorm
from posttrain.backbone.outputs import V4CausalLMOutput, V4ModelOutput
from posttrain.backbone.pretrained import DEFAULTS, V4PreTrainedModel
from posttrain.backbone.rope import rotations
from posttrain.backbone.routing import ExpertChoices, RouteTape
from posttrain.backbone.segments import Documents, continued, find_documents


class V4Model(V4PreTrainedModel, stock.DeepseekV4Model):
    """Token ids to last hidden states."""

    def __init__(self, config: DeepseekV4Config) -> None:
        for name, value in DEFAULTS.items():
            setattr(config, name, getattr(config, name, value))
        super(stock.DeepseekV4Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [V4DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = V4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = stock.DeepseekV4RotaryEmbedding(config)
        self.hc_head = V4HyperHead(config)
        self.gradient_checkpointing = False
        self.auxiliary_scale: float | Tensor | None = None
        """The gradient of the model's own losses, each a mean over a forward's tokens: a loop may
        set it to this micro-batch's share of the step's tokens. None: 1 / `num_microbatches`, or
        what accelerate divides by."""
        self.num_microbatches, self.loss_factor = 1, 1.0
        """How many forwards make a step of a Trainer, and what it multiplies losses by under fp16
        (auxiliary.ScaleOwnLosses)."""
        self.causal: Callable[[], V4ForCausalLM | None] | None = None
        """The model that this is the base of, whose block and head the loss of multi-token
        prediction needs. Weak: a cycle would keep both in memory until they are collected."""
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
            return generation.forward(
                self,
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                replay_routes=replay_routes,
                capture_routes=capture_routes,
                output_hidden_states=kwargs.get("output_hidden_states"),
            )
        embeds, token_ids = self._inputs(input_ids, inputs_embeds)
        shape = (embeds.shape[0], embeds.shape[1])
        documents = find_documents(
            shape, embeds.device, attention_mask=attention_mask, position_ids=position_ids
        )
        counts = self.load_meter is not None and self.training and torch.is_grad_enabled()
        wants_tape = capture_routes or counts or replay_routes is not None
        tape = RouteTape(len(self.layers), replay_routes) if wants_tape else None
        cache = past_key_values if slots is not None else None
        context = self._context(documents, cast("V4Cache | None", cache), slots, tape)
        wanted = kwargs.get("output_hidden_states")
        wanted = self.config.output_hidden_states if wanted is None else wanted
        streams: list[Tensor] = []
        token_id_T = token_ids.flatten()[documents.token_T]
        embeds_TH = embeds.flatten(0, 1)[documents.token_T]
        del embeds  # held here it would stay until the end
        with forming(embeds_TH):
            x_TNH = self._streams(embeds_TH, token_id_T, context, streams if wanted else None)
            hidden_TH = self._collapse(x_TNH)
        told_T = None if input_ids is None else token_id_T
        hidden_TH = self._foretelling(hidden_TH, x_TNH, told_T, context)
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
        return Context(
            documents,
            {name: self._rotations(name, documents.position_T) for name in ("main", "compress")},
            cast("Tensor", self.rotary_emb.compress_inv_freq),
            cast("float", self.rotary_emb.compress_attention_scaling),
            self.config.sliding_window,
            cache,
            slot_D,
            longest_start=longest,
            indexer_loss_scale=self._own_scale(self.config.indexer_loss_weight, cache),
            is_indexer_warmup=self.config.indexer_warmup,
            balance_loss_scale=self._own_scale(self.config.balance_loss_weight, cache),
            tape=tape,
        )

    def _own_scale(self, weight: float, cache: V4Cache | None) -> float | Tensor | None:
        """The gradient of an own loss of this weight; None where it is not wanted."""
        if not (weight and self.training and torch.is_grad_enabled() and cache is None):
            return None
        if (share := self.auxiliary_scale) is None:
            share = step_share(self.num_microbatches) * self.loss_factor
        return weight * share

    def _foretelling(
        self, hidden_TH: Tensor, x_TNH: Tensor, token_id_T: Tensor | None, context: Context
    ) -> Tensor:
        """`hidden_TH` again, the loss of multi-token prediction attached where it is wanted. A base
        model alone has neither its block nor its head: nothing is attached."""
        scale = self._own_scale(self.config.mtp_loss_weight, context.cache)
        causal = self.causal() if self.causal is not None else None
        if scale is None or causal is None:
            return hidden_TH
        return attach_mtp(hidden_TH, x_TNH, token_id_T, context, model=causal, scale=scale)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles; a causal model's own tell their base again."""
        return {**self.__dict__, "causal": None}

    @torch.no_grad()
    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        cache: V4Cache,
        slots: Sequence[int],
        *,
        chunk: int = 8192,
        tape: RouteTape | None = None,
    ) -> Tensor:
        """Take whole prompts into their slots, `chunk` tokens of each at a time; the last token's
        hidden state of each, (len(sequences), H). A `tape` takes down the experts of all their
        tokens, one prompt after the other, or tells them."""
        device, lengths = self.embed_tokens.weight.device, [len(ids) for ids in sequences]
        cache.release(torch.tensor(slots, device=device))
        cache.reserve(max(lengths))
        last = self.embed_tokens.weight.new_zeros(len(sequences), self.config.hidden_size)
        prompt_T = torch.arange(sum(lengths), device=device).split(lengths)
        for first in range(0, max(lengths), chunk):
            rows = [row for row, length in enumerate(lengths) if length > first]
            parts = [list(sequences[row][first : first + chunk]) for row in rows]
            part = None
            if tape is not None:
                part = tape.part(torch.cat([prompt_T[row][first : first + chunk] for row in rows]))
            hidden = self.extend(parts, cache, [slots[row] for row in rows], tape=part)
            last[torch.tensor(rows, device=device)] = hidden
        return last

    @torch.no_grad()
    def extend(
        self,
        parts: Sequence[Sequence[int]],
        cache: V4Cache,
        slots: Sequence[int],
        *,
        tape: RouteTape | None = None,
    ) -> Tensor:
        """Put further tokens behind what the slots hold; the last one's hidden state of each,
        (len(parts), H). A `tape` takes down the experts of the new tokens, or tells them."""
        device, longest = self.embed_tokens.weight.device, max(len(ids) for ids in parts)
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in parts], device=device)
        length = torch.tensor([len(s) for s in parts], device=device)
        mask = torch.arange(longest, device=device) < length[:, None]
        slot = torch.tensor(slots, device=device)
        cache.reserve(int((cache.length_B[slot] + length).max()))
        output = self(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            slots=slot,
            replay_routes=tape.replayed if tape is not None else None,
            capture_routes=tape is not None,
        )
        if tape is not None:
            tape.put(output.routes)
        cache.length_B[slot] += length
        return output.last_hidden_state[torch.arange(len(parts), device=device), length - 1]

    @torch.no_grad()
    def decode(
        self,
        token_B: Tensor,
        cache: V4Cache,
        is_live_B: Tensor,
        *,
        tape: RouteTape | None = None,
    ) -> Tensor:
        """Hidden states (B, H) after one more token in every slot; slots not live do not
        advance. A `tape`, a new one for each step, takes down the experts of the live slots'
        tokens, or tells them; on a GPU it waits for the device."""
        cache.reserve(cache.longest() + 1)  # what is kept must be made outside of inference mode
        with torch.inference_mode():  # a ninth faster than no_grad at one token a row
            context = context_of(self, cache, tape=tape and tape.of_rows(is_live_B))
            hidden_BH = step_hidden(self, token_B, context)
        cache.advance(is_live_B)
        return hidden_BH.clone()

    def _collapse(self, x_TNH: Tensor) -> Tensor:
        return self.norm(self.hc_head(x_TNH.unsqueeze(0)).squeeze(0))

    def _streams(
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
        return x_TNH

    def _rotations(self, name: str, positions: Tensor) -> Tensor:
        rope = self.rotary_emb
        inv_freq, scaling = (
            getattr(rope, f"{name}_{x}") for x in ("inv_freq", "attention_scaling")
        )
        return rotations(inv_freq, positions, scaling)

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
        # unknown to transformers: TRL's reference falls back to Auto
        config.architectures = ["V4ForCausalLM"]
        config.auto_map = {}
        config.router_aux_loss_coef = 0.0  # Switch's loss over raw logits, not V4's
        config.num_experts = config.n_routed_experts  # the name TRL reads
        super(stock.DeepseekV4ForCausalLM, self).__init__(config)
        self.model = V4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model.causal = weakref.ref(self)
        if config.with_mtp:
            self.mtp = nn.ModuleList([V4MTPBlock(config)])
            self.mtp.requires_grad_(bool(config.mtp_loss_weight))
        self.router_aux_loss_coef = 0.0
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.model.causal is None:  # else a shallow copy, and the base is not its own
            self.model.causal = weakref.ref(self)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """What a Trainer asks of its model before it makes its callbacks: so that is when the
        layers' own losses join it, and nobody who does not train loads its modules."""
        join_trainers()
        return True

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
            names = ("num_items_in_batch", "shift_labels")
            passed = {name: kwargs[name] for name in names if name in kwargs}
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
