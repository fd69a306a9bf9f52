"""FlexLoRA against the dense mean and the dense SVD, for clients of different ranks and weights."""

import pytest
import torch

from splitfed.federation import Update, at_rank
from tests.federation.aggregate.adapters import (
    RANK,
    aggregate,
    assert_close,
    best_of_rank,
    dense,
    dense_mean,
    initial,
    make,
    trained,
)

BASE = trained(initial(), 99)
UNLIKE = [(f"c{rank}", Update(trained(at_rank(BASE, rank), rank), weight)) for rank, weight in ((1, 2), (2, 5), (3, 3))]


def test_the_result_is_the_dense_mean_cut_to_the_runs_rank():
    result = aggregate(make(lora="flexlora"), BASE, UNLIKE)
    exact = dense_mean(UNLIKE)
    best = {layer: best_of_rank(matrix, RANK) for layer, matrix in exact.items()}
    assert_close(dense(result.adapter), best, atol=5e-6)
    left_out = sum((exact[layer] - best[layer]).norm() ** 2 for layer in exact) ** 0.5
    assert left_out > 1e-2
    assert result.notes["truncated_norm"] == pytest.approx(left_out.item(), rel=1e-5)


def test_two_rounds_with_clients_of_small_rank_only_leave_nothing_that_cannot_be_trained():
    aggregator, adapter = make(lora="flexlora"), initial()
    for round in (1, 2):
        update = Update(trained(at_rank(adapter, 1), round), 1)
        adapter = aggregate(aggregator, adapter, [("small", update)], round).adapter
        assert_close(dense(adapter), dense(update.state))
    for key, tensor in adapter.items():
        if "lora_A" in key:
            assert (tensor.norm(dim=1) > 0.1).all()


def test_a_mean_of_products_is_over_those_that_trained_the_layer():
    updates = [
        (client, Update({key: t for key, t in update.state.items() if "blocks.0" in key}, update.weight))
        for client, update in UNLIKE[:2]
    ]
    updates.append(UNLIKE[2])
    adapter = aggregate(make(lora="flexlora"), BASE, updates).adapter
    expected = dense_mean(UNLIKE)["blocks.0.q_proj"]
    assert_close(
        dense(adapter),
        {
            "blocks.0.q_proj": best_of_rank(expected, RANK),
            "blocks.1.q_proj": dense(UNLIKE[2][1].state)["blocks.1.q_proj"],
        },
        atol=5e-6,
    )


def test_a_late_update_adds_what_it_changed_in_its_own_product():
    own_base = at_rank(trained(BASE, 5), 2)
    late = Update(trained(own_base, 6), 3, own_base)
    updates = [("late", late), UNLIKE[2]]
    adapter = aggregate(make(lora="flexlora"), BASE, updates).adapter
    for layer, product in dense(adapter).items():
        moved = dense(BASE)[layer] + dense(late.state)[layer] - dense(own_base)[layer]
        mean = 0.5 * moved + 0.5 * dense(UNLIKE[2][1].state)[layer]
        torch.testing.assert_close(product, best_of_rank(mean, RANK), rtol=0, atol=5e-6)


def test_the_norm_of_a_change_of_small_rank_is_from_what_that_client_started_from():
    small = at_rank(BASE, 1)
    aggregator = make(lora="flexlora", norm_bound=1e-3)
    aggregator.begin(BASE, 1)
    aggregator.add("same", Update(small, 1))
    assert aggregator.result().notes["clipped"] == 0
    long = {key: tensor + 1 for key, tensor in small.items()}
    result = aggregate(aggregator, BASE, [("long", Update(long, 1))], 2)
    norm = sum(tensor.numel() for tensor in small.values()) ** 0.5
    shortened = {key: tensor + 1e-3 / norm for key, tensor in small.items()}
    assert result.notes["clipped"] == 1
    assert_close(dense(result.adapter), dense(shortened))


def test_a_base_that_is_no_pairs_of_factors_is_refused():
    with pytest.raises(ValueError, match="has not both LoRA factors"):
        make(lora="flexlora").begin({"x.lora_A.weight": torch.ones(2, 2)}, 1)


def test_an_update_with_one_factor_of_a_layer_is_refused():
    aggregator = make(lora="flexlora")
    aggregator.begin(BASE, 1)
    with pytest.raises(ValueError, match=r"'blocks\.0\.q_proj' has not both LoRA factors"):
        aggregator.add("a", Update({"blocks.0.q_proj.lora_A.weight": torch.ones(3, 5)}, 1))
