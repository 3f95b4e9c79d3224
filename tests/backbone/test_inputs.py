"""What a forward takes and gives: parts of the logits, embeddings beside ids, very short rows, rows
without a token, layers that all route by hash."""

from collections.abc import Sequence

import pytest
import torch
from small_v4 import VOCAB, small_model
from torch import Tensor

from posttrain.backbone import V4ForCausalLM
from posttrain.backbone.presets import CSA, HCA, SLIDING

ALL_KINDS = (SLIDING, CSA, HCA)


def make_model(
    layer_types: Sequence[str] = ALL_KINDS, *, num_hash_layers: int = 1, hca_rate: int = 8
) -> V4ForCausalLM:
    num_moe = len(layer_types) - num_hash_layers
    return small_model(
        layer_types,
        mlp_layer_types=["hash_moe"] * num_hash_layers + ["moe"] * num_moe,
        compress_rates={CSA: 4, HCA: hca_rate},
    )


def draw(rows: int, columns: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))


def assert_all_have_gradients(model: V4ForCausalLM) -> None:
    """Zeros if need be: a rank whose parameter has none would hang the others."""
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 8, 30])
@pytest.mark.parametrize("layers", [ALL_KINDS, (CSA,), (HCA, CSA)])
def test_every_parameter_has_a_gradient_at_every_length(
    layers: Sequence[str], columns: int
) -> None:
    model = make_model(layers)
    model.model(draw(2, columns)).last_hidden_state.sum().backward()
    gradients = {n: p.grad for n, p in model.model.named_parameters()}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []


def test_rows_shorter_than_the_hca_rate_give_its_compressor_a_gradient() -> None:
    model = make_model((HCA,), hca_rate=128)
    ids = draw(2, 100)
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    assert_all_have_gradients(model)


@pytest.mark.parametrize("columns", [5, 0])
def test_a_batch_of_empty_rows(columns: int) -> None:
    model, ids = make_model(), draw(3, columns)
    output = model(ids, attention_mask=torch.zeros_like(ids))
    assert output.logits is not None
    assert torch.equal(output.logits, torch.zeros(3, columns, VOCAB))
    output.logits.sum().backward()
    assert_all_have_gradients(model)


def test_a_batch_without_rows() -> None:
    logits = make_model()(draw(0, 5)).logits
    assert logits is not None
    assert tuple(logits.shape) == (0, 5, VOCAB)


def test_labels_that_are_all_ignored_after_checkpointing_or_not() -> None:
    model, ids = make_model(), draw(2, 12)
    mask = torch.ones_like(ids)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    alone = model(ids[:1], labels=ids[:1]).loss
    assert loss is not None
    assert alone is not None
    torch.testing.assert_close(loss, alone, atol=1e-6, rtol=0)
    loss.backward()
    assert_all_have_gradients(model)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0]), torch.tensor([2, 5, 11])])
def test_logits_to_keep_are_those_of_the_whole(keep: int | Tensor) -> None:
    model, ids = make_model().eval(), draw(2, 12)
    whole, part = model(ids).logits, model(ids, logits_to_keep=keep).logits
    assert whole is not None
    assert part is not None
    columns = range(12)[-keep:] if isinstance(keep, int) else keep.tolist()
    torch.testing.assert_close(part, whole[:, list(columns)], atol=1e-6, rtol=0)


def test_num_items_in_batch_is_the_losss_denominator() -> None:
    model, ids = make_model().eval(), draw(2, 12)
    mean = model(ids, labels=ids).loss
    total = model(ids, labels=ids, num_items_in_batch=torch.tensor(44)).loss
    assert mean is not None
    assert total is not None
    torch.testing.assert_close(total, mean / 2)  # 2 rows of 11 targets


def test_shifted_labels_are_not_shifted_again() -> None:
    model, ids = make_model().eval(), draw(2, 12)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    wanted = model(ids, labels=ids).loss
    found = model(ids, labels=ids, shift_labels=shifted).loss
    assert wanted is not None
    assert found is not None
    torch.testing.assert_close(found, wanted)
    logp = model(ids).logits
    assert logp is not None
    # labels of a sequence-parallel rank: its own last target comes from the next rank
    ends = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    found = model(ids, labels=ids, shift_labels=ends).loss
    torch.testing.assert_close(
        found, -logp.log_softmax(-1).gather(2, ends.unsqueeze(-1)).mean(), atol=1e-6, rtol=0
    )


def test_embeddings_beside_their_ids_are_the_ids_alone() -> None:
    model, ids = make_model().eval(), draw(2, 12)
    embeds = model.get_input_embeddings()(ids)
    wanted, found = model(ids).logits, model(ids, inputs_embeds=embeds).logits
    assert torch.equal(found, wanted)
    other = model(ids, inputs_embeds=embeds + 0.5).logits
    assert (other - wanted).abs().max() > 0.1


def test_embeddings_alone_do_where_no_layer_routes_by_hash() -> None:
    model, ids = make_model(num_hash_layers=0).eval(), draw(2, 12)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_embeddings_alone_are_refused_in_words_where_a_layer_routes_by_hash() -> None:
    model = make_model()
    embeds = model.get_input_embeddings()(draw(2, 12))
    with pytest.raises(ValueError, match="hash layers choose experts by token id"):
        model(inputs_embeds=embeds)


def test_all_layers_may_route_by_hash() -> None:
    model, ids = make_model(num_hash_layers=3), draw(2, 30)
    # trainers ask for router logits where a config declares them; there is nothing to balance
    loss = model(ids, labels=ids, output_router_logits=True).loss
    assert loss is not None
    loss.backward()
    assert_all_have_gradients(model)


def test_return_dict_false_gives_a_tuple() -> None:
    model, ids = make_model().eval(), draw(2, 12)
    named = model(ids, labels=ids)
    output = model(ids, labels=ids, return_dict=False)
    assert type(output) is tuple
    loss, logits = output[:2]
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    (hidden,) = model.model(ids, return_dict=False)[:1]
    assert torch.equal(hidden, model.model(ids).last_hidden_state)
