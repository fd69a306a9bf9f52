"""FLoRA against the dense sums: stacking loses nothing, and the residual is the best of its rank."""

import pytest
import torch

from splitfed.config.aggregation import AggregationSection
from splitfed.federation import Update, at_rank, make_aggregator, merged
from tests.federation.aggregate.adapters import (
    aggregate,
    assert_close,
    assert_same_bits,
    best_of_rank,
    dense,
    dense_mean,
    initial,
    make,
    trained,
)

BASE = initial()


def unlike(base, seed):
    ranks_and_weights = ((1, 2), (2, 5), (3, 3))
    return [
        (f"c{rank}", Update(trained(at_rank(base, rank), seed + rank), weight)) for rank, weight in ranks_and_weights
    ]


def total(aggregator, adapter):
    products, residual = dense(adapter), dense(aggregator.residual())
    return {layer: product + residual[layer] for layer, product in products.items()}


def test_residual_and_trained_product_are_the_exact_sum_while_it_fits():
    aggregator, adapter = make(lora="flora", flora_rank=7), BASE
    expected = {layer: torch.zeros_like(matrix) for layer, matrix in dense(BASE).items()}
    for round in range(1, 5):
        updates = unlike(adapter, 10 * round)
        result = aggregate(aggregator, adapter, updates, round)
        expected = {layer: matrix + dense_mean(updates)[layer] for layer, matrix in expected.items()}
        assert_close(total(aggregator, result.adapter), expected, atol=5e-6)
        assert result.notes["truncated_norm"] < 1e-5
        adapter = result.adapter


def test_the_residual_is_the_best_of_its_rank():
    aggregator, adapter = make(lora="flora", flora_rank=2), BASE
    before = {layer: torch.zeros_like(matrix) for layer, matrix in dense(BASE).items()}
    for round in (1, 2):
        updates = unlike(adapter, 10 * round)
        result = aggregate(aggregator, adapter, updates, round)
        exact = {layer: matrix + dense_mean(updates)[layer] for layer, matrix in before.items()}
        best = {layer: best_of_rank(matrix, 2) for layer, matrix in exact.items()}
        after = total(aggregator, result.adapter)
        assert_close(after, best, atol=5e-6)
        left_out = sum((exact[layer] - best[layer]).norm() ** 2 for layer in exact) ** 0.5
        assert left_out > 1e-2
        assert result.notes["truncated_norm"] == pytest.approx(left_out.item(), rel=1e-4)
        adapter, before = result.adapter, after


def test_every_round_starts_from_the_initial_adapter():
    aggregator, adapter = make(lora="flora", flora_rank=2), BASE
    for round in (1, 2):
        adapter = aggregate(aggregator, adapter, unlike(adapter, round), round).adapter
        assert_same_bits(adapter, BASE)


def test_a_product_that_a_round_starts_with_is_not_lost():
    base = trained(BASE, 99)
    aggregator = make(lora="flora", flora_rank=7)
    updates = unlike(base, 1)
    assert_close(total(aggregator, aggregate(aggregator, base, updates).adapter), dense_mean(updates), atol=5e-6)


def test_a_layer_that_nobody_trained_keeps_its_residual():
    aggregator = make(lora="flora", flora_rank=2)
    aggregate(aggregator, BASE, unlike(BASE, 1))
    before = aggregator.residual()
    some = [
        (client, Update({key: t for key, t in update.state.items() if "blocks.0" in key}, update.weight))
        for client, update in unlike(BASE, 2)
    ]
    aggregate(aggregator, BASE, some, 2)
    after = aggregator.residual()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        key for key in after if "blocks.0" in key
    }


def test_a_late_update_adds_its_product():
    aggregator = make(lora="flora", flora_rank=7)
    late = Update(trained(BASE, 1), 1, BASE)
    assert_close(
        total(aggregator, aggregate(aggregator, BASE, [("late", late)], 2).adapter), dense(late.state), atol=5e-6
    )


def test_merged_is_one_adapter_of_both_ranks_with_the_same_product():
    aggregator = make(lora="flora", flora_rank=4)
    aggregate(aggregator, BASE, unlike(BASE, 1))
    adapter = trained(BASE, 7)
    one = merged(adapter, aggregator.residual())
    assert {tensor.shape[0] for key, tensor in one.items() if "lora_A" in key} == {3 + 4}
    assert_close(dense(one), total(aggregator, adapter))
    assert_same_bits(merged(adapter, {}), adapter)


def test_the_residual_has_its_rank_from_the_first_round_on_and_is_empty_before():
    aggregator = make_aggregator(AggregationSection(lora="flora"), 5)
    assert aggregator.residual() == {}
    aggregator.begin(BASE, 1)
    residual = aggregator.residual()
    assert {key: tuple(tensor.shape) for key, tensor in residual.items()} == {
        "blocks.0.q_proj.lora_A.weight": (5, 5),
        "blocks.0.q_proj.lora_B.weight": (7, 5),
        "blocks.1.q_proj.lora_A.weight": (5, 9),
        "blocks.1.q_proj.lora_B.weight": (6, 5),
    }
    assert not any(tensor.any() for tensor in residual.values())


def test_a_residual_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"residual of 'blocks\.0\.q_proj' has rank 3, not flora_rank = 2"):
        make(lora="flora", flora_rank=2).load(BASE)
