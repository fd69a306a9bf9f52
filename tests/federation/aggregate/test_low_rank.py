"""The decomposition of stacked factors against the dense SVD, and adapters for agents of smaller rank."""

import pytest
import torch

from splitfed.federation import at_rank
from splitfed.federation.aggregate.low_rank import layers, stacked, truncated
from tests.federation.aggregate.adapters import assert_close, assert_same_bits, best_of_rank, dense, initial, trained


def products(ranks, n_outputs, n_inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            weight,
            torch.randn(n_outputs, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, n_inputs, generator=generator, dtype=torch.float64),
        )
        for weight, rank in zip((0.5, 0.3, -0.2), ranks, strict=False)
    ]


@pytest.mark.parametrize("ranks", [(2,), (1, 4), (3, 2, 5), (8, 8, 8)])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (30, 20)])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_the_truncation_is_that_of_the_dense_matrix(ranks, shape, rank):
    terms = products(ranks, *shape)
    matrix = sum(weight * b @ a for weight, b, a in terms)
    left, right = stacked(terms)
    torch.testing.assert_close(left @ right, matrix, rtol=0, atol=1e-12)
    b, a, left_out = truncated(left, right, rank, spare_A=torch.zeros(rank, shape[1]))
    assert (b.shape, a.shape, b.dtype, a.dtype) == ((shape[0], rank), (rank, shape[1]), torch.float32, torch.float32)
    best = best_of_rank(matrix, rank)
    torch.testing.assert_close(b.double() @ a.double(), best, rtol=0, atol=2e-5)
    assert left_out == pytest.approx((matrix - best).norm().item(), rel=1e-9, abs=1e-12)


def test_singular_values_are_in_b_and_the_largest_element_of_each_row_of_a_is_positive():
    left, right = stacked(products((3, 2, 5), 7, 6))
    b, a, _ = truncated(left, right, 4, spare_A=torch.zeros(4, 6))
    torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(left @ right)[:4]
    torch.testing.assert_close(b.T.double() @ b.double(), torch.diag(values**2), rtol=0, atol=1e-4)
    assert all(row[row.abs().argmax()] > 0 for row in a)


def test_signs_do_not_depend_on_those_of_the_factors():
    terms = products((3, 2), 7, 6)
    flipped = [(weight, -b, -a) for weight, b, a in terms]
    one, other = (truncated(*stacked(given), 3, spare_A=torch.zeros(3, 6)) for given in (terms, flipped))
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


def test_rows_that_no_direction_is_left_for_come_from_the_spare_ones_with_a_zero_column():
    spare = torch.randn(5, 6)
    b, a, left_out = truncated(*stacked(products((2,), 7, 6)), 5, spare_A=spare)
    assert torch.equal(a[2:], spare[2:])
    assert not b[:, 2:].any()
    assert left_out == 0


@pytest.mark.parametrize("rank", [1, 2])
def test_an_agent_of_smaller_rank_gets_the_best_factors_of_that_rank(rank):
    adapter = trained(trained(initial(), 1, size=1.0), 2)
    small = at_rank(adapter, rank)
    assert {tensor.shape[0] for key, tensor in small.items() if "lora_A" in key} == {rank}
    assert_close(
        dense(small), {layer: best_of_rank(matrix, rank) for layer, matrix in dense(adapter).items()}, atol=5e-6
    )


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_a_slice_of_the_initial_adapter_is_the_initial_adapter_of_the_smaller_rank(rank):
    assert_same_bits(at_rank(initial(8), rank), initial(rank))


def test_a_layer_of_no_larger_rank_stays_as_it_is():
    adapter = trained(initial(2), 1)
    assert_same_bits(at_rank(adapter, 2), adapter)
    assert_same_bits(at_rank(adapter, 5), adapter)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_of_zero_is_refused(rank):
    with pytest.raises(ValueError, match=f"An adapter of rank {rank} has nothing to train"):
        at_rank(initial(), rank)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"x.lora_A.weight": torch.ones(2, 3)}, "'x' has not both LoRA factors"),
        ({"x.lora_B.weight": torch.ones(2, 3)}, "'x' has not both LoRA factors"),
        ({"x": torch.ones(2, 3)}, "'x' has not both LoRA factors"),
        (
            {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 3)},
            r"\[4, 3\] by \[2, 3\], which is no",
        ),
        ({"x.lora_A.weight": torch.ones(2), "x.lora_B.weight": torch.ones(4, 2)}, "which is no product"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(adapter, message):
    with pytest.raises(ValueError, match=message):
        layers(adapter)
