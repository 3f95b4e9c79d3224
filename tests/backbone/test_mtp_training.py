"""The block of multi-token prediction learns under trainers that call the base model alone."""

import copy
import gc
import pickle
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_v4 import VOCAB, small_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl_steps import Gradients, gradients_of, step_options

from posttrain.backbone.balance import BalanceExperts
from posttrain.backbone.fp4 import fake_fp8_activation
from posttrain.backbone.mtp import observe
from posttrain.tokenizer import build_tokenizer

WEIGHT = 0.3
LENGTHS = (13, 1, 29, 2, 3, 22)


def draw(lengths: Sequence[int], vocab_size: int = VOCAB) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths]


def make(**changes: Any) -> Any:
    options: dict[str, Any] = {"with_mtp": True, "mtp_loss_weight": WEIGHT, **changes}
    return small_model(**options)


def foretold(model: Any, document: Tensor) -> tuple[Tensor, Tensor]:
    """sum_t -log p(token t + 1) and, by the block, sum_t -log p(token t + 2), spelled out."""
    seen = observe(model.model, document[None])
    logp = model.lm_head(seen.hidden_BSH[0]).log_softmax(-1)
    main = -logp[:-1].gather(1, document[1:, None]).sum()
    embed = model.model.embed_tokens(document.roll(-1))
    logp = model.lm_head(model.mtp[0](seen.x_TNH, embed, seen.context)).log_softmax(-1)
    return main, -logp[:-2].gather(1, document[2:, None]).sum()


def gradients_alone(
    model: Any, documents: Sequence[Tensor], *, main_weight: float = 1.0
) -> dict[str, Tensor]:
    """Of main_weight * mean next-token loss + WEIGHT * mean loss of the block, by hand: each
    document unpadded, in a forward of its own."""
    model.config.mtp_loss_weight = 0.0
    num_tokens, num_next = sum(map(len, documents)), sum(len(d) - 1 for d in documents)
    num_after = sum(max(len(d) - 2, 0) for d in documents)
    for document in documents:
        model.model.auxiliary_scale = len(document) / num_tokens
        main, after = foretold(model, document)
        (main_weight * main / num_next + WEIGHT * after / num_after).backward()
    return gradients_of(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-8
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def of_block(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: gradient for name, gradient in gradients.items() if name.startswith("mtp.")}
    assert found["mtp.0.e_proj.weight"].any()
    return found


@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_packed_sft_gives_block_backbone_and_head_the_gradients_of_the_documents_alone(
    is_checkpointed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "1")  # TRL's trainers report every run to the hub, but not from CI
    tokenizer: Any = build_tokenizer()
    documents = draw(LENGTHS, len(tokenizer))
    model = make(vocab_size=len(tokenizer))
    wanted = gradients_alone(copy.deepcopy(model), documents)
    gradients, ids = Gradients(), [d.tolist() for d in documents]
    options = {"packing": True, "max_length": 70, "per_device_train_batch_size": 6}
    SFTTrainer(
        model,
        args=SFTConfig(**step_options(tmp_path, **options, gradient_checkpointing=is_checkpointed)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer,
        callbacks=[gradients],
    ).train()
    assert_same(gradients.found, wanted)
    assert of_block(gradients.found).keys() == {f"mtp.{n}" for n, _ in model.mtp.named_parameters()}


def own_gradients(model: Any, ids: Tensor, **batch: Any) -> dict[str, Tensor]:
    """What the losses that hang on the base model's hidden states give by themselves."""
    model.zero_grad()
    (model.model(ids, **batch).last_hidden_state.sum() * 0).backward()
    return gradients_of(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_rows_without_a_token_change_nothing(side: str) -> None:
    model, documents = make(), draw(LENGTHS)
    wanted = gradients_alone(copy.deepcopy(model), documents, main_weight=0.0)
    ids, mask = torch.full((7, 31), 2), torch.zeros(7, 31)
    for row, document in enumerate(documents):
        place = slice(31 - len(document), 31) if side == "left" else slice(len(document))
        ids[row, place], mask[row, place] = document, 1.0
    assert_same(own_gradients(model, ids, attention_mask=mask), wanted)


@pytest.mark.parametrize("lengths", [[1], [2, 1, 2], []])
def test_where_nothing_is_foretold_the_block_gets_zeros(lengths: list[int]) -> None:
    ids, mask = torch.full((4, 3), 5), torch.zeros(4, 3)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    model = make()
    own_gradients(model, ids, attention_mask=mask)
    assert all(p.grad is not None and not p.grad.any() for p in model.mtp.parameters())


def test_without_weight_the_block_gets_nothing_and_the_rest_the_same_bits() -> None:
    (document,) = draw([29])
    found: list[dict[str, Tensor]] = []
    model = make(mtp_loss_weight=0.0)
    bare = small_model()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")})
    for each in (model, bare):
        each(document[None], labels=document[None]).loss.backward()
        found.append(gradients_of(each))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_the_loss_is_attached_where_something_trains_and_nowhere_else() -> None:
    (document,) = draw([29])
    model = make()
    trained = model(document[None]).logits
    with torch.no_grad():
        assert torch.equal(model(document[None]).logits, trained)
    model.eval()
    assert torch.equal(model(document[None]).logits, trained)
    found = own_gradients(model, document[None])
    assert not any(name.startswith("mtp.") for name in found)


def test_the_share_of_a_microbatch_scales_it() -> None:
    (document,) = draw([29])
    model = make()
    whole = own_gradients(model, document[None])
    model.model.auxiliary_scale = 0.5
    half = own_gradients(model, document[None])
    assert all(
        torch.equal(half[name], 0.5 * gradient) for name, gradient in of_block(whole).items()
    )


def test_checkpointing_gives_the_same_bits() -> None:
    (document,) = draw([29])
    model = make()
    wanted = own_gradients(model, document[None])
    model.gradient_checkpointing_enable()
    found = own_gradients(model, document[None])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in of_block(found).items())
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).train()


def test_copies_pickles_and_what_was_saved_train_blocks_of_their_own(tmp_path: Path) -> None:
    (document,) = draw([29])
    model = make()
    wanted = of_block(own_gradients(model, document[None]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model, tmp_path)):
        model.zero_grad()
        found = of_block(own_gradients(other, document[None]))
        assert_same(found, wanted)
        assert gradients_of(model) == {}
    shallow = copy.copy(model)
    del shallow
    assert of_block(own_gradients(model, document[None])).keys() == wanted.keys()


def test_a_model_is_freed_with_its_last_reference() -> None:
    model = make()
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_adapters_in_block_and_backbone_learn_from_it() -> None:
    (document,) = draw([29])
    model = make()
    model.config.indexer_loss_weight = 0.0
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["e_proj", "q_a_proj"]))
    (adapted.base_model.model.model(document[None]).last_hidden_state.sum() * 0).backward()
    found = gradients_of(adapted)
    ends = [name for name, g in found.items() if name.endswith("lora_B.default.weight") and g.any()]
    assert sum("mtp.0.e_proj" in name for name in ends) == 1
    assert sum(".layers." in name for name in ends) == 3
    assert all("lora_" in name for name in found)


def test_a_block_on_a_frozen_backbone_learns_alone() -> None:
    model, (document,) = make(), draw([29])
    wanted = of_block(own_gradients(model, document[None]))
    model.zero_grad()
    for part in (model.model, model.lm_head):
        part.requires_grad_(False)
    model(document[None], labels=document[None]).loss.backward()
    found = gradients_of(model)
    assert found.keys() == wanted.keys()
    assert_same(found, wanted)


@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
def test_ddp_finds_every_parameter_in_use_however_short_the_rows_are(
    tmp_path: Path, weight: float
) -> None:
    model = make(balance_loss_weight=1.0, mtp_loss_weight=weight)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        for length in (29, 2, 1, 1):  # a forward raises where one before it left some waiting
            model.zero_grad()
            parallel(torch.full((1, length), 5)).logits.sum().backward()
    finally:
        dist.destroy_process_group()
    waiting = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert waiting == set()
    assert frozen == (
        {n for n, _ in model.named_parameters() if "mtp" in n} if not weight else set()
    )


def test_what_cannot_be_foretold_is_said() -> None:
    embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    scored = ["moe"] * 3
    with pytest.raises(ValueError, match=r"no block.*weight is 0.3"):
        small_model(mtp_loss_weight=WEIGHT)(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match=r"give input_ids.*weight is 0.3"):
        make(mlp_layer_types=scored)(inputs_embeds=embeds)
    make(mlp_layer_types=scored).eval()(inputs_embeds=embeds)
    with torch.no_grad():
        make(mlp_layer_types=scored)(inputs_embeds=embeds)


def test_the_blocks_balance_loss_is_of_each_document_alone() -> None:
    # a weight that leaves nothing of the block's main loss: gradients are the balance loss's
    model, documents = make(mtp_loss_weight=1e-12, balance_loss_weight=1.0), draw(LENGTHS)
    num_tokens = sum(LENGTHS)
    for document in documents:
        model.model.auxiliary_scale = len(document) / num_tokens
        (model.model(document[None]).last_hidden_state.sum() * 0).backward()
    wanted = gradients_of(model)
    model.model.auxiliary_scale = None
    position = torch.cat([torch.arange(n) for n in LENGTHS])
    found = own_gradients(model, torch.cat(documents)[None], position_ids=position[None])
    assert found["mtp.0.mlp.gate.weight"].abs().max() > 1e-6
    assert_same(found, wanted)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_blocks_bias_follows_its_load(is_checkpointed: bool) -> None:
    model, (document,) = make(), draw([29])
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    gate: Any = model.mtp[0].mlp.gate
    gate.e_score_correction_bias.zero_()
    chosen: list[Tensor] = []
    hook = model.mtp[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: chosen.append(args[1])
    )
    callback, nothing = BalanceExperts(speed=0.25), object()
    callback.on_train_begin(nothing, nothing, nothing, model=model)
    own_gradients(model, document[None])
    hook.remove()
    callback.on_optimizer_step(nothing, nothing, nothing, model=model)
    load_E = chosen[0].flatten().bincount(minlength=8)
    wanted_E = 0.25 * torch.sign(load_E.sum() - 8 * load_E)
    assert wanted_E.any()
    assert torch.equal(gate.e_score_correction_bias, wanted_E.to(torch.float32))
    callback.on_train_end(nothing, nothing, nothing, model=model)
    assert model.mtp[0].load_meter is model.model.load_meter is None


def test_the_blocks_inputs_are_rounded_where_the_backbones_are() -> None:
    (document,) = draw([29])
    found: list[Tensor] = []
    for parts in ((), ("activations",)):
        model = make(fake_quantization=parts)
        projection = model.mtp[0].self_attn.q_a_proj  # its hook comes after the one that rounds
        projection.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        model.model(document[None])
    plain, rounded = found
    assert torch.equal(fake_fp8_activation(rounded), rounded)
    assert not torch.equal(fake_fp8_activation(plain), plain)
