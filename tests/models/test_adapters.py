import math
from dataclasses import replace

import pytest
import torch

from splitfed.models import (
    LoraSettings,
    Partition,
    adapter_parameters,
    adapter_shapes,
    adapter_state,
    add_adapter,
    initial_adapter,
    load_adapter_state,
    partition,
)
from splitfed.models.adapters import initial_factor
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)
KEY = "model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def parts() -> Partition:
    return partition(tiny_model("llama"), bottom_blocks=1, top_blocks=1)


def test_only_the_adapter_trains(parts: Partition) -> None:
    for segment in parts:
        add_adapter(segment, LORA, seed=0)
        trained = {id(parameter) for parameter in segment.parameters() if parameter.requires_grad}
        assert trained == {id(parameter) for parameter in adapter_parameters(segment).values()}


def test_the_whole_models_modules_get_no_adapter() -> None:
    model = tiny_model("llama")
    modules = dict(model.named_modules())
    trunk = partition(model, bottom_blocks=1, top_blocks=1).trunk
    add_adapter(trunk, LORA, seed=0)
    assert dict(model.named_modules()) == modules
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_at_its_start_changes_nothing(parts: Partition) -> None:
    hidden_BTD = torch.randn(2, 5, 32)
    before_BTD = parts.trunk(hidden_BTD)
    add_adapter(parts.trunk, LORA, seed=0)
    assert torch.equal(parts.trunk(hidden_BTD), before_BTD)


def test_a_segment_without_blocks_gets_no_adapter_and_is_frozen() -> None:
    bottom = partition(tiny_model("gpt2"), bottom_blocks=0, top_blocks=1).bottom
    add_adapter(bottom, LORA, seed=0)
    assert adapter_state(bottom) == {}
    assert adapter_shapes(bottom, LORA) == {}
    assert not any(parameter.requires_grad for parameter in bottom.parameters())
    assert bottom(torch.randint(3, VOCABULARY, (1, 4))).shape == (1, 4, 32)


def test_keys_are_the_whole_models(parts: Partition) -> None:
    shapes = adapter_shapes(parts.trunk, LORA)
    add_adapter(parts.trunk, LORA, seed=0)
    state = adapter_state(parts.trunk)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes == adapter_shapes(parts.trunk, LORA)
    assert {key.split(".")[2] for key in state} == {"1", "2"}
    assert state[KEY].shape == (4, 32)
    assert state[KEY.replace("lora_A", "lora_B")].shape == (32, 4)


def test_the_adapter_is_float32_on_a_base_of_half_precision() -> None:
    parts = partition(tiny_model("llama").to(torch.bfloat16), bottom_blocks=1, top_blocks=1)
    add_adapter(parts.trunk, LORA, seed=0)
    assert {tensor.dtype for tensor in adapter_state(parts.trunk).values()} == {torch.float32}
    hidden_BTD = torch.randn(1, 4, 32, dtype=torch.bfloat16)
    assert parts.trunk(hidden_BTD).dtype == torch.bfloat16


def test_a_smaller_rank_is_the_leading_rows_of_a_larger_one() -> None:
    large_RI = initial_factor(KEY, (64, 33), seed=1)
    for rank in (1, 4, 8):
        assert torch.equal(initial_factor(KEY, (rank, 33), seed=1), large_RI[:rank])


def test_the_start_depends_on_seed_and_key() -> None:
    factor_RI = initial_factor(KEY, (4, 32), seed=1)
    assert torch.equal(factor_RI, initial_factor(KEY, (4, 32), seed=1))
    assert not torch.equal(factor_RI, initial_factor(KEY, (4, 32), seed=2))
    assert not torch.equal(factor_RI, initial_factor(KEY.replace(".2.", ".1."), (4, 32), seed=1))


def test_the_start_is_kaiming_uniform_as_pefts() -> None:
    factor_RI = initial_factor(KEY, (64, 256), seed=1)
    reference_RI = torch.nn.init.kaiming_uniform_(torch.empty(64, 256), a=math.sqrt(5))
    bound = 1 / math.sqrt(256)
    assert reference_RI.abs().max() <= bound
    assert 0.999 * bound < factor_RI.abs().max() <= bound
    assert abs(factor_RI.mean()) < 4 * bound / math.sqrt(3 * factor_RI.numel())
    # the variance of a uniform distribution is bound² / 3, that of its estimate 4 bound⁴ / 45 n
    spread = 4 * math.sqrt(4 / 45 / factor_RI.numel()) * bound**2
    assert factor_RI.square().mean().item() == pytest.approx(bound**2 / 3, abs=spread)
    assert not initial_factor(KEY.replace("lora_A", "lora_B"), (32, 4), seed=1).any()


def test_named_targets_are_adapted_and_no_others(parts: Partition) -> None:
    lora = replace(LORA, targets=("q_proj", "down_proj"))
    add_adapter(parts.trunk, lora, seed=0)
    assert {key.split(".")[-3] for key in adapter_state(parts.trunk)} == {"q_proj", "down_proj"}


def test_a_mistyped_target_is_refused_with_the_choice(parts: Partition) -> None:
    lora = replace(LORA, targets=("q_proj", "v_prj"))
    for segment in parts:
        with pytest.raises(ValueError, match=r"'v_prj'.*choose among down_proj, gate_proj"):
            add_adapter(segment, lora, seed=0)
    with pytest.raises(ValueError, match="'v_prj'"):
        initial_adapter(tiny_model("llama"), lora, seed=0)


def test_targets_of_other_blocks_are_no_mistake() -> None:
    parts = partition(tiny_model("lfm2"), bottom_blocks=1, top_blocks=1)  # one attention block, in the trunk
    for segment in parts:
        add_adapter(segment, replace(LORA, targets=("q_proj",)), seed=0)
    assert [len(adapter_state(segment)) for segment in parts] == [0, 2, 0]


def test_dropout_and_scale_are_the_settings(parts: Partition) -> None:
    add_adapter(parts.trunk, replace(LORA, dropout=0.25), seed=0)
    layer = parts.trunk.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.scaling["default"] == 8.0 / 4


def test_layers_start_at_their_own_rank_with_the_runs_numbers_and_scale(parts: Partition) -> None:
    lora = replace(LORA, ranks={"model.layers.2.self_attn.q_proj": 16})
    add_adapter(parts.trunk, lora, seed=1)
    state = adapter_state(parts.trunk)
    assert torch.equal(state[KEY], initial_factor(KEY, (16, 32), seed=1))
    other = KEY.replace("q_proj", "k_proj")
    assert torch.equal(state[other], initial_factor(other, (4, 32), seed=1))
    attention = parts.trunk.model.model.layers[1].self_attn
    assert attention.q_proj.scaling["default"] == attention.k_proj.scaling["default"] == 8.0 / 4


def test_a_state_is_loaded_whole_or_not_at_all(parts: Partition) -> None:
    add_adapter(parts.trunk, LORA, seed=0)
    before = adapter_state(parts.trunk)
    other = {key: tensor + 1 for key, tensor in before.items()}
    load_adapter_state(parts.trunk, {**other, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)})
    assert all(torch.equal(tensor, other[key]) for key, tensor in adapter_state(parts.trunk).items())
    with pytest.raises(ValueError, match="no tensor"):
        load_adapter_state(parts.trunk, {key: tensor for key, tensor in before.items() if key != KEY})
    with pytest.raises(ValueError, match=r"shape \[8, 32\], not \[4, 32\]"):
        load_adapter_state(parts.trunk, {**before, KEY: torch.zeros(8, 32)})
    assert all(torch.equal(tensor, other[key]) for key, tensor in adapter_state(parts.trunk).items())


def test_a_state_is_a_copy(parts: Partition) -> None:
    add_adapter(parts.trunk, LORA, seed=0)
    state = adapter_state(parts.trunk)
    state[KEY].zero_()
    assert adapter_state(parts.trunk)[KEY].any()
