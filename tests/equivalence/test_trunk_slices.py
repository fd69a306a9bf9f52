"""A slice of a trunk = the trunk of a partition at those split points, to the bit, with no tensor of its own."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitfed.models import (
    LoraSettings,
    Trunk,
    adapter_parameters,
    adapter_state,
    add_adapter,
    load_adapter_state,
    load_bottom_and_top,
    load_residual,
    load_trunk,
    partition,
    residual_parameters,
    trunk_slice,
)
from splitfed.models.families import FAMILIES
from tests.equivalence.closeness import assert_equal_to_rounding
from tests.equivalence.tiny_models import N_BLOCKS, VOCABULARY, tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)
EVERY_SLICE = [range(first, last) for first in range(N_BLOCKS) for last in range(first + 1, N_BLOCKS + 1)]
T = 12


def random_like(state: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}


def adapted(trunk: Trunk, *, residual_rank: int = 0) -> Trunk:
    add_adapter(trunk, LORA, seed=0, residual_rank=residual_rank)
    return trunk


def whole_trunk(model: PreTrainedModel) -> Trunk:
    """A trunk of all blocks, with an adapter away from its start."""
    trunk = adapted(partition(model, bottom_blocks=0, top_blocks=0).trunk)
    load_adapter_state(trunk, random_like(adapter_state(trunk), seed=3))
    return trunk


def partition_trunk(model: PreTrainedModel, blocks: range, adapter: Mapping[str, Tensor]) -> Trunk:
    parts = partition(model, bottom_blocks=blocks.start, top_blocks=N_BLOCKS - blocks.stop)
    load_adapter_state(adapted(parts.trunk), adapter)
    return parts.trunk


def output_and_gradients(trunk: Trunk, hidden_BTD: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Output, smashed gradient and the adapter's gradients; the latter are taken off the parameters."""
    hidden_BTD = hidden_BTD.clone().requires_grad_()
    output_BTD = trunk(hidden_BTD, mask_BT)
    (output_BTD * torch.linspace(-1, 1, output_BTD.numel()).view_as(output_BTD)).sum().backward()
    found = {"output": output_BTD.detach(), "smashed gradient": hidden_BTD.grad}
    for key, parameter in adapter_parameters(trunk).items():
        found[key] = parameter.grad
        parameter.grad = None
    return found


def assert_slices_equal_partitions(model: PreTrainedModel, whole: Trunk, slices: Iterable[range]) -> None:
    state = adapter_state(whole)
    hidden_BTD = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones(2, T, dtype=torch.long)
    mask_BT[0, -4:] = 0
    for blocks in slices:
        expected = output_and_gradients(partition_trunk(model, blocks, state), hidden_BTD, mask_BT)
        found = output_and_gradients(trunk_slice(whole, blocks), hidden_BTD, mask_BT)
        assert found.keys() == expected.keys()
        for what, tensor in expected.items():
            assert (tensor is None) == (found[what] is None), f"{what}, {blocks}"
            assert tensor is None or torch.equal(found[what], tensor), f"{what}, {blocks}"


def storages(module: nn.Module) -> dict[int, int]:
    """Bytes of every storage that a module's tensors are in, those outside of parameters and buffers included."""
    found: dict[int, int] = {}

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)

    for each in module.modules():
        look(vars(each))
    return {address: n_bytes for address, n_bytes in found.items() if n_bytes}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_slice_gives_the_output_and_gradients_of_a_partition_and_holds_no_tensor_of_its_own(family: str) -> None:
    model = tiny_model(family)
    whole = whole_trunk(model)
    assert_slices_equal_partitions(model, whole, [range(1, 3)])
    assert storages(trunk_slice(whole, range(1, 3))).keys() <= storages(whole).keys()


# Per-block lists, indices in arithmetic, sliding windows, learned positions, blocks with attention beside others.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bamba", "jamba", "qwen3_next", "gpt_neo"])
def test_every_slice_equals_the_partition_at_its_split_points(family: str) -> None:
    model = tiny_model(family)
    assert_slices_equal_partitions(model, whole_trunk(model), EVERY_SLICE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_slices_with_adapter_and_residual_together_cost_no_byte(family: str) -> None:
    model = tiny_model(family)
    whole = adapted(partition(model, bottom_blocks=0, top_blocks=0).trunk, residual_rank=3)
    before = storages(whole)
    every = [trunk_slice(whole, blocks) for blocks in EVERY_SLICE]
    together = {address: n for each in every for address, n in storages(each).items()}
    assert sum((before | together).values()) == sum(before.values())
    assert {id(p) for each in every for p in each.parameters()} == {id(p) for p in whole.parameters()}


def test_a_change_of_the_trunks_adapter_and_residual_is_a_change_of_its_slices() -> None:
    whole = adapted(partition(tiny_model("llama"), bottom_blocks=0, top_blocks=0).trunk, residual_rank=3)
    part = trunk_slice(whole, range(1, 3))
    load_adapter_state(whole, random_like(adapter_state(whole), seed=1))
    load_residual(whole, random_like(residual_parameters(whole), seed=2))
    for of_whole, of_part in (
        (adapter_parameters(whole), adapter_parameters(part)),
        (residual_parameters(whole), residual_parameters(part)),
    ):
        assert {key.split(".")[2] for key in of_part} == {"1", "2"}
        assert all(of_part[key] is of_whole[key] for key in of_part)


@torch.no_grad()
def test_slices_of_one_loaded_trunk_serve_agents_with_other_split_points(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    input_ids_BT = torch.randint(3, VOCABULARY, (2, T))
    expected_BTV = model(input_ids_BT).logits
    trunk = load_trunk(tmp_path, bottom_blocks=0, top_blocks=0)
    assert trunk.blocks == range(N_BLOCKS)
    for blocks in EVERY_SLICE:
        bottom, top = load_bottom_and_top(tmp_path, bottom_blocks=blocks.start, top_blocks=N_BLOCKS - blocks.stop)
        logits_BTV = top(trunk_slice(trunk, blocks)(bottom(input_ids_BT))).logits
        assert_equal_to_rounding(logits_BTV, expected_BTV, str(blocks))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next", "bamba"])
@torch.no_grad()
def test_a_slice_decodes_with_a_cache_as_the_trunk_of_a_partition_does(family: str) -> None:
    model = tiny_model(family)
    whole = partition(model, bottom_blocks=0, top_blocks=0).trunk
    hidden_BTD = torch.randn(2, T, 32)
    for blocks in EVERY_SLICE:
        parts = partition(model, bottom_blocks=blocks.start, top_blocks=N_BLOCKS - blocks.stop)
        decoded = []
        for trunk in (trunk_slice(whole, blocks), parts.trunk):
            cache = trunk.new_cache()
            pieces = [(0, 9), (9, 10), (10, 11), (11, T)]
            decoded.append(torch.cat([trunk(hidden_BTD[:, a:b], past_key_values=cache) for a, b in pieces], dim=1))
            assert cache.get_seq_length() == T
        assert torch.equal(*decoded), blocks


@torch.no_grad()
def test_a_slice_of_a_slice_is_the_slice() -> None:
    whole = whole_trunk(tiny_model("gpt2"))
    hidden_BTD = torch.randn(2, T, 32)
    nested = trunk_slice(trunk_slice(whole, range(1, 4)), range(2, 3))
    assert nested.blocks == range(2, 3)
    assert torch.equal(nested(hidden_BTD), trunk_slice(whole, range(2, 3))(hidden_BTD))
