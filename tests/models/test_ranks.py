import pytest
import torch
from torch import Tensor

from splitfed.models import LoraSettings, adapter_ranks, adapter_shapes, initial_adapter, settings_of
from tests.equivalence.tiny_models import tiny_model

LORA = LoraSettings(rank=4, alpha=6.0, dropout=0.1, targets=("q_proj",))


def adapter(**ranks: int) -> dict[str, Tensor]:
    """One layer a rank, called as its argument."""
    state: dict[str, Tensor] = {}
    for layer, rank in ranks.items():
        state[f"{layer}.lora_A.weight"] = torch.zeros(rank, 5)
        state[f"{layer}.lora_B.weight"] = torch.zeros(7, rank)
    return state


def test_ranks_are_read_off_both_factors() -> None:
    assert adapter_ranks(adapter(a=3, b=1)) == {"a": 3, "b": 1}
    assert adapter_ranks({}) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"a.lora_A.weight": None}, r"no tensor 'a\.lora_A\.weight'"),
        ({"a.lora_B.weight": None}, r"no tensor 'a\.lora_B\.weight'"),
        ({"a.lora_A.weight": torch.zeros(2, 5)}, r"\[2, 5\] and \[7, 3\], which have no rank in common"),
        ({"a.lora_A.weight": torch.zeros(3)}, "no rank in common"),
        ({"a.lora_A.weight": torch.zeros(0, 5), "a.lora_B.weight": torch.zeros(7, 0)}, "no rank in common"),
        ({"a.bias": torch.zeros(3)}, "names no LoRA factor"),
    ],
)
def test_what_has_no_rank_is_refused(changes: dict[str, Tensor | None], reason: str) -> None:
    state = {key: tensor for key, tensor in (adapter(a=3) | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=reason):
        adapter_ranks(state)


def test_settings_of_a_state_have_its_usual_rank_and_name_the_others() -> None:
    settings = settings_of(adapter(a=8, b=2, c=8, d=16), LORA)
    assert (settings.rank, settings.ranks) == (8, {"b": 2, "d": 16})
    assert (settings.dropout, settings.targets) == (LORA.dropout, LORA.targets)
    assert settings_of(adapter(a=8, b=2), LORA).rank == 8


def test_settings_of_a_state_keep_the_runs_scale() -> None:
    settings = settings_of(adapter(a=6, b=6, c=16), LORA)
    assert settings.alpha / settings.rank == settings.alpha_at(16) / 16 == LORA.alpha / LORA.rank


def test_settings_of_the_runs_own_adapter_are_the_runs() -> None:
    assert settings_of(initial_adapter(tiny_model("llama"), LORA, seed=0), LORA) == LORA
    assert settings_of({}, LORA) == LORA


def test_settings_of_a_state_describe_its_shapes() -> None:
    model = tiny_model("llama")
    lora = LoraSettings(rank=4, ranks={"model.layers.1.mlp.up_proj": 7, "model.layers.3.self_attn.k_proj": 2})
    state = initial_adapter(model, lora, seed=0)
    assert adapter_shapes(model, settings_of(state, LoraSettings(rank=16))) == {k: t.shape for k, t in state.items()}
