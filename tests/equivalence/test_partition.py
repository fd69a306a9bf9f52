"""Segments chained = the whole model: every family, every legal split point, padding on both sides, cached decoding."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from splitfed.models import Partition, partition
from splitfed.models.families import FAMILIES, Family
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import N_BLOCKS, VOCABULARY, tiny_model

SPLIT_POINTS = [(bottom, top) for bottom in range(N_BLOCKS) for top in range(N_BLOCKS - bottom)]
T = 12


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def padded_batch() -> tuple[Tensor, Tensor]:
    """Tokens and mask of three rows: padded on the left, padded on the right, full. Longer than every window."""
    input_ids_BT = torch.randint(3, VOCABULARY, (3, T), generator=torch.Generator().manual_seed(1))
    attention_mask_BT = torch.ones(3, T, dtype=torch.long)
    attention_mask_BT[0, :4] = 0
    attention_mask_BT[1, -5:] = 0
    return input_ids_BT, attention_mask_BT


def every_partition(model: PreTrainedModel) -> Iterator[Partition]:
    for bottom_blocks, top_blocks in SPLIT_POINTS:
        yield partition(model, bottom_blocks=bottom_blocks, top_blocks=top_blocks)


@pytest.fixture(scope="module")
def partitions(model: PreTrainedModel) -> list[Partition]:
    """The model at every split point: segments hold no state between calls."""
    return list(every_partition(model))


def split_loss_and_backward(parts: Partition, input_ids_BT: Tensor, labels_BT: Tensor, **masks: Tensor) -> tuple:
    """One forward and backward as over a wire: only values cross a split point, and gradients come back."""
    smashed_BTD = parts.bottom(input_ids_BT, **masks)
    received_BTD = smashed_BTD.detach().requires_grad_()
    trunk_output_BTD = parts.trunk(received_BTD, **masks)
    top_input_BTD = trunk_output_BTD.detach().requires_grad_()
    output = parts.top(top_input_BTD, labels=labels_BT, **masks)
    output.loss.backward()
    trunk_output_BTD.backward(top_input_BTD.grad)
    smashed_BTD.backward(received_BTD.grad)
    return output.logits.detach(), output.loss.detach()


def taken_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_segments_equal_whole(model: PreTrainedModel, parts: Iterator[Partition], **masks: Tensor) -> None:
    input_ids_BT, attention_mask_BT = padded_batch()
    seen_BT = attention_mask_BT.bool() if "attention_mask" in masks else torch.ones_like(input_ids_BT, dtype=torch.bool)
    labels_BT = input_ids_BT.masked_fill(~seen_BT, -100)
    whole = model(input_ids_BT, labels=labels_BT, **masks)
    whole.loss.backward()
    gradients = taken_gradients(model)
    for split in parts:
        where = f"{split.bottom_blocks} + {split.top_blocks} blocks on the agent"
        logits_BTV, loss = split_loss_and_backward(split, input_ids_BT, labels_BT, **masks)
        assert_equal_to_rounding(loss, whole.loss.detach(), f"loss, {where}")
        assert_equal_to_rounding(logits_BTV[seen_BT], whole.logits.detach()[seen_BT], f"logits, {where}")
        split_gradients = taken_gradients(model)
        assert split_gradients.keys() == gradients.keys(), where
        for name, gradient in gradients.items():
            assert_equal_to_rounding(split_gradients[name], gradient, f"gradient of {name}, {where}")


def test_segments_give_the_whole_models_loss_logits_and_gradients_at_every_split_point(
    model: PreTrainedModel, partitions: list[Partition]
) -> None:
    _, attention_mask_BT = padded_batch()
    assert_segments_equal_whole(model, iter(partitions), attention_mask=attention_mask_BT)


def test_segments_equal_the_whole_model_without_a_mask(model: PreTrainedModel) -> None:
    assert_segments_equal_whole(model, iter([partition(model, bottom_blocks=0, top_blocks=1)]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "cohere", "opt", "mixtral"])
def test_segments_of_a_model_with_tied_embeddings_give_its_gradients(family: str) -> None:
    model = tiny_model(family, tie_word_embeddings=True, word_embed_proj_dim=32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_segments_equal_whole(model, iter([partition(model, bottom_blocks=1, top_blocks=1)]))


def test_segments_take_position_ids_as_the_whole_model_does(model: PreTrainedModel) -> None:
    _, attention_mask_BT = padded_batch()
    positions_BT = (attention_mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    if model.config.model_type in {
        "bloom",
        "mpt",
    }:  # ALiBi: the whole model takes none, the segments take and leave them
        assert parts.trunk(torch.ones(3, T, 32), position_ids=positions_BT).shape == (3, T, 32)
        return
    masks = {"attention_mask": attention_mask_BT, "position_ids": positions_BT}
    assert_segments_equal_whole(model, iter([parts]), **masks)


@torch.no_grad()
def test_cached_decoding_through_segments_equals_the_whole_models(
    model: PreTrainedModel, partitions: list[Partition]
) -> None:
    input_ids_BT, attention_mask_BT = padded_batch()
    input_ids_BT, attention_mask_BT = input_ids_BT[::2], attention_mask_BT[::2]
    pieces = [(0, 8), (8, 9), (9, 10), (10, 11), (11, T)]
    cache = DynamicCache(config=model.config)
    whole = [
        model(
            input_ids_BT[:, a:b], attention_mask=attention_mask_BT[:, :b], past_key_values=cache, use_cache=True
        ).logits
        for a, b in pieces
    ]
    for parts in partitions:
        bottom_cache, trunk_cache, top_cache = (segment.new_cache() for segment in parts)
        for (a, b), expected_BTV in zip(pieces, whole, strict=True):
            mask_BT = attention_mask_BT[:, :b]
            smashed_BTD = parts.bottom(input_ids_BT[:, a:b], mask_BT, past_key_values=bottom_cache)
            trunk_output_BTD = parts.trunk(smashed_BTD, mask_BT, past_key_values=trunk_cache)
            logits_BTV = parts.top(trunk_output_BTD, mask_BT, past_key_values=top_cache).logits
            seen_BT = mask_BT[:, a:b].bool()
            where = f"tokens {a} to {b}, {parts.bottom_blocks} + {parts.top_blocks} blocks on the agent"
            assert_equal_to_rounding(logits_BTV[seen_BT], expected_BTV[seen_BT], where)


def test_segments_share_the_whole_models_parameters_and_the_trunk_holds_only_its_blocks(model: PreTrainedModel) -> None:
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    parts = partition(model, bottom_blocks=1, top_blocks=1)
    for segment in parts:
        for name, parameter in segment.model.named_parameters():
            assert segment.whole_model_name(name) == names_of[parameter]
    held = {segment.kind: {names_of[parameter] for parameter in segment.parameters()} for segment in parts}
    blocks = f"{model.base_model_prefix}.{FAMILIES[model.config.model_type].blocks}."
    assert held["trunk"] == {name for name in names_of.values() if name.startswith((f"{blocks}1.", f"{blocks}2."))}
    assert held["bottom"] | held["trunk"] | held["top"] == set(names_of.values())


DROPOUTS = [
    "dropout",
    "embd_pdrop",
    "embed_dropout",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
]


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family != Family()))
@torch.no_grad()
def test_dropout_of_the_embeddings_is_the_bottoms_alone(family: str) -> None:
    model = tiny_model(family, **dict.fromkeys(DROPOUTS, 0.5)).train()
    hidden_BTD = torch.randn(2, T, 32)
    top = partition(model, bottom_blocks=1, top_blocks=0).top  # without blocks nothing else may drop
    torch.testing.assert_close(top(hidden_BTD).logits, top.eval()(hidden_BTD).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_next", "opt"])
def test_the_whole_model_generates_as_before(family: str) -> None:
    model = tiny_model(family)
    prompt_BT = torch.randint(3, VOCABULARY, (1, 5))
    before = model.generate(prompt_BT, max_new_tokens=6, do_sample=False)
    settings = model.config.to_dict()
    for parts in every_partition(model):
        parts.trunk(parts.bottom(prompt_BT))
    assert model.config.to_dict() == settings
    assert torch.equal(model.generate(prompt_BT, max_new_tokens=6, do_sample=False), before)
