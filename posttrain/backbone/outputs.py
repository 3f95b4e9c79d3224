"""What V4's forwards return: transformers' outputs with one more field."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from posttrain.backbone.routing import ExpertChoices


@dataclass
class V4ModelOutput(MoeModelOutputWithPast):
    """transformers', and the experts of every real token where they were to be captured."""

    routes: ExpertChoices | None = None


@dataclass
class V4CausalLMOutput(MoeCausalLMOutputWithPast):
    """transformers', and the experts of every real token where they were to be captured."""

    routes: ExpertChoices | None = None
