"""The slots of any causal model of transformers' whose layers attend to their whole past or to a
sliding window of it (Llama, Qwen, Mistral, Gemma and the like): keys and values by slot, no padding
on the left. Keys out of the window stay where they are, hidden.

Legend: B slots, D rows of a forward, n new tokens of each, R room for tokens, h key heads, d head
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from posttrain.backbone.decode_keys import whole

ROOM = 256
"""The room grows by so many tokens."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values (B, h, R, d); `rows` says where a forward's tokens stand."""

    def __init__(self, rows: SlotRows) -> None:
        super().__init__()
        self.rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(self.rows.num_slots, x.shape[1], 0, x.shape[3])
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep the new (D, h, n, d); give the rows' keys and values up to the longest's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._kept(self.keys, key_states)
        self.values = self._kept(self.values, value_states)
        slot_D, reach = self.rows.slot_D, self.rows.reach
        return self.keys[slot_D, :, :reach], self.values[slot_D, :, :reach]

    def _kept(self, x: Tensor | None, new: Tensor) -> Tensor:
        assert x is not None
        more = -(-self.rows.reach // ROOM) * ROOM - x.shape[2]
        if more > 0:
            x = torch.nn.functional.pad(x, (0, 0, 0, more))
        x[self.rows.slot_D[:, None], :, self.rows.place_Dn] = new.transpose(1, 2)
        return x

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.reach, 0

    def get_seq_length(self) -> int:
        return self.rows.reach

    def get_max_length(self) -> int:
        return -1


class SlotRows:
    """Where the tokens of the forward that runs stand."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.reach = num_slots, 0
        self.slot_D = self.place_Dn = torch.zeros(0, dtype=torch.long)


class GenericSlots:
    """What `V4Slots` is, by ordinary forwards: one of the slots' tokens, one of the chunk."""

    def __init__(self, model: Any, num_slots: int) -> None:
        """Raises ValueError: layers that keep something else of the past, or not all of it."""
        self._windows = windows_of(model.config)
        self._model, width = model, whole(num_slots)
        self._filling, self._shelf = width, width + 1  # slots that no row has
        self._rows = SlotRows(width + 2)
        layers = model.config.get_text_config().num_hidden_layers
        self._layers = [SlotLayer(self._rows) for _ in range(layers)]
        self._cache = Cache(layers=[*self._layers])
        self._held = [0] * (width + 2)

    def step(
        self,
        live: Mapping[int, int],
        reading: Sequence[tuple[int, Sequence[int]]],
        *,
        wants_routes: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """As `V4Slots.step` does."""
        if wants_routes:
            raise ValueError("wants_routes: only V4 models tell which experts tokens went to")
        found: list[Tensor] = []
        if live:
            rows = [(slot, [live.get(slot, 0)]) for slot in range(whole(max(live) + 1))]
            found.append(self._forward(rows)[sorted(live)])
        if reading:
            fill = whole(len(reading)) - len(reading)
            rows = [*((s, list(ids)) for s, ids in reading), *[(self._filling, [0])] * fill]
            found.append(self._forward(rows)[: len(reading)])
        for slot in live:
            self._held[slot] += 1
        for slot, ids in reading:
            self._held[slot] += len(ids)
        return torch.cat(found), []

    def _forward(self, parts: Sequence[tuple[int, list[int]]]) -> Tensor:
        """The logits (D, V) after each row's last new token."""
        device, columns = self._model.device, max(len(ids) for _, ids in parts)
        columns = columns if columns == 1 else whole(columns)
        ids_Dn = torch.tensor([[*ids, *[0] * (columns - len(ids))] for _, ids in parts])
        start_D = torch.tensor([self._held[slot] for slot, _ in parts])
        rows = self._rows
        rows.slot_D = torch.tensor([slot for slot, _ in parts], device=device)
        rows.place_Dn = (start_D[:, None] + torch.arange(columns)).to(device)
        rows.reach = whole(int(start_D.max()) + columns)
        key_R = torch.arange(rows.reach, device=device)
        biases = {kind: self._bias(key_R, window) for kind, window in self._windows.items()}
        logits_DnV = self._model(
            ids_Dn.to(device),
            attention_mask=biases if len(biases) > 1 else next(iter(biases.values())),
            position_ids=rows.place_Dn,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        last_D = torch.tensor([len(ids) - 1 for _, ids in parts], device=device)
        return logits_DnV[torch.arange(len(parts), device=device), last_D]

    def _bias(self, key_R: Tensor, window: int | None) -> Tensor:
        """(D, 1, n, R): the lowest number where a token does not see a key."""
        place_Dn1 = self._rows.place_Dn.unsqueeze(-1)
        is_hidden_DnR = key_R > place_Dn1
        if window is not None:
            is_hidden_DnR |= key_R <= place_Dn1 - window
        bias = torch.zeros(is_hidden_DnR.shape, dtype=self._model.dtype, device=key_R.device)
        return bias.masked_fill_(is_hidden_DnR, torch.finfo(bias.dtype).min).unsqueeze(1)

    def ahead(self, slots: Sequence[int], num_steps: int) -> None:
        """Not of these models: step by step."""

    def release(self, slots: Sequence[int]) -> None:
        """Empty these slots: what is past a row's end is never seen."""
        for slot in slots:
            self._held[slot] = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each target what its source slot is."""
        for layer in self._layers:
            for x in (layer.keys, layer.values):
                assert x is not None
                x[list(targets)] = x[list(sources)]
        for source, target in zip(sources, targets, strict=True):
            self._held[target] = self._held[source]

    def shelve(self, slot: int) -> None:
        """Keep what the slot is, in the place of what was kept before."""
        self.copy([slot], [self._shelf])

    def unshelve(self, slots: Sequence[int]) -> None:
        """Make these slots what was kept."""
        self.copy([self._shelf] * len(slots), slots)


def windows_of(config: Any) -> dict[str, int | None]:
    """The kinds of the model's layers, and how many tokens each sees; None: all.

    Raises ValueError: a layer keeps something else of the past."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    of_kind = {"full_attention": None, "sliding_attention": window}
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = dict.fromkeys(getattr(text, "layer_types", None) or [usual])
    if not kinds.keys() <= of_kind.keys():
        raise ValueError(
            f"{text.model_type} has layers of kinds {sorted(kinds)}: the engine samples from "
            f"V4, or from models whose layers are of {sorted(of_kind)}"
        )
    return {kind: of_kind[kind] for kind in kinds}
