"""Other causal models of transformers' through the same engine."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from at_hand import VOCAB, make_requests, run, said_by_a_tool
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_model(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
        elif name == "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
        elif name == "gemma":
            kinds = ["sliding_attention", "full_attention"]
            config = Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=kinds)
            model = Gemma3ForCausalLM(config)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
        model.lm_head.weight.data *= 20
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "gemma"])
def test_rollouts_are_those_of_full_forwards_in_any_slots_and_order(name: str) -> None:
    model = make_model(name)
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"temperature": 0.6}]
    asked = make_requests(12, longest=70, max_new_tokens=16)
    asked = [replace(r, **ways[i % 3]) for i, r in enumerate(asked)]
    asked += [replace(asked[1], sample=n) for n in (1, 2)]
    found = run(model, asked, 4)
    for num_slots, order in ((1, asked[:3]), (16, asked[::-1])):
        others = run(model, order, num_slots)
        assert all(found[k].response == r.response for k, r in others.items())
    for key, rollout in found.items():
        request = next(r for r in asked if (r.prompt_id, r.sample) == key)
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt + rollout.response])).logits[0]
        logits = logits[len(rollout.prompt) - 1 : -1].double()
        if request.temperature == 0:
            assert logits.argmax(-1).tolist() == rollout.response
        logp = (logits / (request.temperature or 1.0)).log_softmax(-1)
        wanted = logp.gather(1, torch.tensor(rollout.response)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logp).double(), wanted, atol=1e-4, rtol=0)


def test_a_tool_speaks_to_another_model_too() -> None:
    model = make_model("llama")
    asked = make_requests(5, max_new_tokens=120, continue_turn=said_by_a_tool)
    asked = [replace(r, stop_token_ids=tuple(range(VOCAB // 2))) for r in asked]
    found = run(model, asked, 2)
    assert found == run(model, asked[::-1], 2)
    assert any(not all(r.is_own) for r in found.values())


def test_layers_that_keep_something_else_are_refused() -> None:
    model = make_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="llama has layers of kinds"):
        run(model, make_requests(1))
    with pytest.raises(ValueError, match="only V4 models tell"):
        run(make_model("llama"), make_requests(1, wants_routes=True))
