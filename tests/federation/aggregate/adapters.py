"""Small adapters, and what they are as dense matrices."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from splitfed.config.aggregation import AggregationSection
from splitfed.federation import Aggregate, Aggregator, Update, make_aggregator

LAYERS = {"blocks.0.q_proj": (7, 5), "blocks.1.q_proj": (6, 9)}
RANK = 3

Updates = Sequence[tuple[str, Update]]


def initial(rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """An adapter before the first step: A is random, B is zero; a smaller rank is a slice of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for layer, (n_outputs, n_inputs) in LAYERS.items():
        a = torch.rand(16, n_inputs, generator=generator) * 2 - 1
        adapter[f"{layer}.lora_A.weight"] = a[:rank].clone()
        adapter[f"{layer}.lora_B.weight"] = torch.zeros(n_outputs, rank)
    return adapter


def trained(base: Mapping[str, Tensor], seed: int, *, size: float = 0.1, only: str = "") -> dict[str, Tensor]:
    """An adapter after some training: every tensor whose name holds ``only`` has changed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: tensor + size * torch.randn(tensor.shape, generator=generator) * (only in key)
        for key, tensor in base.items()
    }


def dense(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The product of each layer's factors, float64."""
    layers = sorted({key.rpartition(".lora_")[0] for key in adapter})
    return {
        layer: adapter[f"{layer}.lora_B.weight"].double() @ adapter[f"{layer}.lora_A.weight"].double()
        for layer in layers
    }


def dense_mean(updates: Updates) -> dict[str, Tensor]:
    """The weighted mean of the clients' products, float64."""
    total = sum(update.weight for _, update in updates)
    sums: dict[str, Tensor] = {}
    for _, update in updates:
        for layer, product in dense(update.state).items():
            sums[layer] = sums.get(layer, 0) + product * (update.weight / total)
    return sums


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, by the dense SVD."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def aggregate(aggregator: Aggregator, base: Mapping[str, Tensor], updates: Updates, round: int = 1) -> Aggregate:
    """Run one round."""
    aggregator.begin(base, round)
    for client, update in updates:
        aggregator.add(client, update)
    return aggregator.result()


def make(**keys: object) -> Aggregator:
    """Make the rule of an [aggregation] section with these keys."""
    return make_aggregator(AggregationSection.model_validate(keys), RANK)


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Compare names, shapes, dtypes and every bit."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert tensor.shape == other[key].shape
        assert tensor.numpy().tobytes() == other[key].numpy().tobytes(), key


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, atol: float = 1e-6) -> None:
    """Compare names and values, to float32 rounding unless said otherwise."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor.double(), other[key].double(), rtol=0, atol=atol)
