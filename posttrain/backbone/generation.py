"""transformers' `generate` on a V4Cache: how padded columns become rows, lengths and slots.

`generate` speaks of columns: a batch (B, n) of new tokens after `past` columns, a mask (B, past +
n) over all of them, padding anywhere. A V4Cache speaks of rows: slot b holds `length_B[b]` tokens,
padding left out. So the mask's last n columns say which tokens each row gets, and how far it goes.
One token a row is a decode step; more are appended by the attention core, in whatever pieces.

A cache has no gradient: it is filled and read with gradients off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from posttrain.backbone.cache import V4Cache
from posttrain.backbone.outputs import V4ModelOutput
from posttrain.backbone.routing import ExpertChoices, RouteTape

ASSISTED_SPARE = 64
"""Tokens that assisted generation may take back: its candidates of one round."""


def wants_cache(model: Any, past_key_values: object, use_cache: bool | None) -> bool:
    """Whether a forward goes through a cache: it was given one to go on with, or asked for one.
    Asking is in vain where gradients are wanted: stock would fill one for nobody."""
    if isinstance(past_key_values, V4Cache):
        return True
    if isinstance(past_key_values, Cache) and past_key_values.get_seq_length() > 0:
        return True
    return bool(use_cache) and not (model.training and torch.is_grad_enabled())


@torch.no_grad()
def forward(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: object = None,
    inputs_embeds: Tensor | None = None,
    *,
    replay_routes: ExpertChoices | None = None,
    capture_routes: bool = False,
    output_hidden_states: bool | None = None,
) -> V4ModelOutput:
    """What n new columns give, and the cache after them.

    Args:
        model: a V4Model.
        input_ids: (B, n) int64.
        attention_mask: (B, past + n) or (B, n), 1 at tokens; None: all new ones are tokens.
        position_ids: (B or 1, n); they must count up by one over a row's tokens, and are else
            unused: a row's positions follow from how many tokens it holds.
        past_key_values: a V4Cache of B slots to go on with; None or an empty cache of
            transformers' for a new one.
        inputs_embeds: (B, n, H), instead of the embedding of `input_ids`.
        replay_routes, capture_routes: as `V4Model.forward` has them, of the new tokens.
        output_hidden_states: also the streams before each layer; None: as the config says.

    Raises:
        ValueError: a cache of another kind or batch, a mask of another width, packed rows, routes
        of other tokens or layers.
    """
    new = input_ids if input_ids is not None else inputs_embeds
    if new is None:
        raise ValueError("give input_ids (B, n), or inputs_embeds (B, n, H)")
    batch, columns = new.shape[:2]
    cache = cache_for(model, past_key_values, batch)
    past = cache.get_seq_length()
    is_token_BS = new_tokens(attention_mask, (batch, columns), past, new.device)
    if position_ids is not None and columns > 1:
        check_positions(position_ids[..., -columns:], is_token_BS)
    cache.reserve(cache.longest() + columns)
    if output_hidden_states is None:
        output_hidden_states = bool(model.config.output_hidden_states)
    if columns == 1 and inputs_embeds is None and not output_hidden_states:
        output = one_column(model, new, is_token_BS, cache, replay_routes, capture_routes)
    else:
        output = model(
            input_ids,
            attention_mask=is_token_BS.long(),
            inputs_embeds=inputs_embeds,
            past_key_values=cache,
            slots=is_token_BS.any(dim=1).nonzero().squeeze(1),
            replay_routes=replay_routes,
            capture_routes=capture_routes,
            output_hidden_states=output_hidden_states,
        )
        cache.length_B = cache.length_B + is_token_BS.sum(dim=1)
    cache.num_columns = past + columns
    output.past_key_values = cache
    return output


def one_column(
    model: Any,
    token_B1: Tensor,
    is_token_B1: Tensor,
    cache: V4Cache,
    replay_routes: ExpertChoices | None,
    capture_routes: bool,
) -> V4ModelOutput:
    """A decode step, in which padded rows do not advance."""
    tape = None
    if capture_routes or replay_routes is not None:
        tape = RouteTape(len(model.layers), replay_routes)
    hidden_BH = model.decode(token_B1[:, 0], cache, is_token_B1[:, 0].long(), tape=tape)
    hidden_B1H = hidden_BH.masked_fill(~is_token_B1, 0.0).unsqueeze(1)
    return V4ModelOutput(
        last_hidden_state=hidden_B1H,  # pyright: ignore[reportArgumentType]
        routes=tape.choices if tape is not None and capture_routes else None,
    )


def cache_for(model: Any, past_key_values: object, batch: int) -> V4Cache:
    """The V4Cache given, or a new one in the place of an empty cache of transformers'."""
    if isinstance(past_key_values, V4Cache):
        if past_key_values.num_slots != batch:
            raise ValueError(
                f"the cache has {past_key_values.num_slots} rows and the batch {batch}: one of each"
                " is needed; V4Cache.batch_repeat_interleave and batch_select_indices change it"
            )
        return past_key_values
    num_spare = 0
    if past_key_values is not None:
        if not isinstance(past_key_values, Cache) or past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__} that holds tokens, V4Model "
                "keeps its past in a V4Cache: start without one and go on with the outputs'"
            )
        records = any(getattr(layer, "record_past", False) for layer in past_key_values.layers)
        num_spare = ASSISTED_SPARE if records else 0
    like = model.embed_tokens.weight
    return V4Cache(model.config, batch, like=like, num_spare=num_spare)


def new_tokens(
    attention_mask: object, shape: tuple[int, int], past: int, device: torch.device
) -> Tensor:
    """Which of the (B, n) new places are tokens: the mask's last n columns, as bool."""
    batch, columns = shape
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    is_tensor = isinstance(attention_mask, Tensor)
    if not is_tensor or tuple(attention_mask.shape) not in ((batch, past + columns), shape):
        found = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask is {found}, but the cache has seen {past} columns and {columns} are "
            f"new: give it in 2-D as {(batch, past + columns)}, and to `generate` no other "
            "cache_implementation than the dynamic one"
        )
    return attention_mask[:, -columns:].to(device).bool()


def check_positions(position_ids: Tensor, is_token_BS: Tensor) -> None:
    """Positions count up by one over each row's tokens: a row of a cache is one document."""
    first_BS = position_ids.to(is_token_BS.device) - is_token_BS.long().cumsum(dim=1)
    step_BS = first_BS - first_BS.masked_fill(~is_token_BS, first_BS.max()).amin(1, keepdim=True)
    wrong = (is_token_BS & (step_BS != 0)).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"position_ids of row {wrong[0]} do not count up by one: a row of a cache is one "
            "document, so packed rows have none; call with use_cache=False"
        )
