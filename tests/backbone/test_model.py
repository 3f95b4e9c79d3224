"""Names, files and tables: what ours saves stock reads, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4 import DeepseekV4ForCausalLM

from posttrain.backbone import V4ForCausalLM, preset_config
from posttrain.backbone.routing import balanced_hash_table


def loaded(auto: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and what its loading found missing, unexpected or mismatched."""
    return auto.from_pretrained(folder, output_loading_info=True)


def make(seed: int = 0) -> Any:
    config = preset_config("tiny", vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return V4ForCausalLM(config)


def test_the_auto_class_gives_ours_and_saved_files_go_both_ways(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "ours")
    ours, info = loaded(AutoModelForCausalLM, tmp_path / "ours")
    assert type(ours) is V4ForCausalLM
    assert not any(info.values()), info
    stock, info = loaded(DeepseekV4ForCausalLM, tmp_path / "ours")
    assert not any(info.values()), info
    stock.save_pretrained(tmp_path / "stock", save_original_format=False)
    back, info = loaded(V4ForCausalLM, tmp_path / "stock")
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_the_same_seed_makes_the_same_model() -> None:
    first, second, other = make(0).state_dict(), make(0).state_dict(), make(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.gate.tid2eid"], other["model.layers.0.mlp.gate.tid2eid"]
    )


@pytest.mark.parametrize(
    ("vocab_size", "top_k", "num_experts"), [(300, 2, 4), (61, 6, 16), (7, 3, 3)]
)
def test_a_hash_table_is_balanced_and_its_experts_differ(
    vocab_size: int, top_k: int, num_experts: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = balanced_hash_table(vocab_size, top_k, num_experts)
    assert all(len(set(row)) == top_k for row in table.tolist())
    for column in table.T:
        counts = torch.bincount(column, minlength=num_experts)
        assert int(counts.max() - counts.min()) <= 1


def test_from_config_fills_the_hash_table() -> None:
    table = make().model.layers[0].mlp.gate.tid2eid
    assert int(torch.bincount(table[:, 0], minlength=8).min()) == 37  # 300 tokens over 8 experts


def test_the_tiny_preset_is_about_a_million_parameters() -> None:
    model = make()
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    assert model.config.index_n_heads >= 16
    assert len(set(model.config.layer_types)) == 3


def test_labels_give_the_shifted_cross_entropy() -> None:
    model, ids = make(), torch.tensor([[0, 5, 6, 7, 1]])
    labels = torch.tensor([[-100, -100, 6, 7, 1]])
    logp = model(ids).logits[0].log_softmax(-1)
    wanted = -(logp[1, 6] + logp[2, 7] + logp[3, 1]) / 3
    torch.testing.assert_close(model(ids, labels=labels).loss, wanted)


def test_generate_without_a_cache_continues_left_padded_prompts_as_if_alone() -> None:
    model = make()
    prompts = [[0, 9, 8, 7, 12, 44], [0, 5]]
    batch = torch.tensor([prompts[0], [2, 2, 2, 2, *prompts[1]]])
    mask = (batch != 2).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(prompts):
        single = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert together[row, 6:].tolist() == single[0, len(prompt) :].tolist()
