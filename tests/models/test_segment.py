import pytest
import torch
from transformers import DynamicCache

from splitfed.models import partition
from tests.equivalence.tiny_models import VOCABULARY, tiny_model


@pytest.mark.parametrize(
    ("family", "name", "whole_name"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.0", "transformer.h.2"),
        ("opt", "model.decoder.layers.0.fc1.bias", "model.decoder.layers.2.fc1.bias"),
        ("llama", "model.norm.weight", "model.norm.weight"),
        ("llama", "model.layers", "model.layers"),
        ("llama", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_whole_model_names_have_the_block_indices_restored(family: str, name: str, whole_name: str) -> None:
    top = partition(tiny_model(family), bottom_blocks=1, top_blocks=2).top
    assert top.whole_model_name(name) == whole_name


def test_bottom_and_trunk_return_hidden_states_before_the_final_norm() -> None:
    model = tiny_model("llama")
    parts = partition(model, bottom_blocks=1, top_blocks=0)
    input_ids_BT = torch.randint(3, VOCABULARY, (2, 6))
    smashed_BTD = parts.bottom(input_ids_BT)
    trunk_output_BTD = parts.trunk(smashed_BTD)
    assert smashed_BTD.shape == trunk_output_BTD.shape == (2, 6, parts.trunk.hidden_size)
    logits_BTV = model.lm_head(model.model.norm(trunk_output_BTD))
    torch.testing.assert_close(logits_BTV, model(input_ids_BT).logits)


@pytest.mark.parametrize(("family", "bottom_blocks"), [("gpt2", 0), ("qwen3_next", 1)])
def test_a_cache_counts_tokens_where_no_block_of_the_segment_attends(family: str, bottom_blocks: int) -> None:
    bottom = partition(tiny_model(family), bottom_blocks=bottom_blocks, top_blocks=1).bottom
    cache = bottom.new_cache()
    bottom(torch.randint(3, VOCABULARY, (2, 5)), past_key_values=cache)
    bottom(torch.randint(3, VOCABULARY, (2, 1)), past_key_values=cache)
    assert cache.get_seq_length() == 6


def test_the_top_gives_its_cache_back_when_asked_for_one() -> None:
    top = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=2).top
    assert top(torch.randn(1, 3, 32)).past_key_values is None
    cache = top(torch.randn(1, 3, 32), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    assert len(cache.layers) == 2


def test_the_loss_is_the_familys_own_and_takes_its_options() -> None:
    parts = partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1)
    hidden_BTD = torch.randn(2, 6, 32)
    labels_BT = torch.randint(3, VOCABULARY, (2, 6))
    mean = parts.top(hidden_BTD, labels=labels_BT).loss
    total = parts.top(hidden_BTD, labels=labels_BT, num_items_in_batch=1).loss
    torch.testing.assert_close(total, mean * 2 * 5)  # a row of 6 tokens has 5 labels
    assert parts.top(hidden_BTD, logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)
