"""A search by gradient needs neither public text nor the noise."""

import pytest
import torch

from splitfed.privacy.leakage.tokens_descent import GradientDescent
from tests.privacy.leakage.token_world import clipped, make_world, mix


def deep(x_BTD):
    return mix(mix(mix(x_BTD)))


def recovered(world, blocks=mix, **options):
    attack = GradientDescent(world.table_VD, blocks, clipped, **options)
    hits = attack.recover(world.smashed_BTD) == world.private.input_ids_BT
    return hits[world.private.is_real].float().mean().item()


def test_without_noise_it_finds_the_tokens_behind_blocks():
    assert recovered(make_world(blocks=mix, n_private=20)) > 0.95


def test_rounds_find_more_than_the_same_steps_in_one_go():
    world = make_world(blocks=deep, n_private=20)
    assert recovered(world, deep, steps=120) > recovered(world, deep, steps=120, rounds=1) + 0.05


def test_a_little_noise_leaves_most_tokens_and_much_noise_next_to_none():
    assert recovered(make_world(0.1, blocks=mix, n_private=20)) > 0.9
    assert recovered(make_world(1e3, blocks=mix, n_private=20)) < 0.15


def test_no_gradient_is_left_on_the_blocks_parameters():
    layer = torch.nn.Linear(8, 8)
    attack = GradientDescent(torch.randn(5, 8, requires_grad=True), layer, clipped, steps=4, rounds=2)
    attack.recover(torch.randn(2, 3, 8))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_nothing_is_drawn_and_sequences_do_not_influence_each_other():
    world, before = make_world(0.1, blocks=mix, n_private=20), torch.get_rng_state()
    attack = GradientDescent(world.table_VD, mix, clipped, steps=40, rounds=4)
    together = attack.recover(world.smashed_BTD)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(attack.recover(world.smashed_BTD[17:18]), together[17:18])


def test_it_works_where_gradients_are_off():
    world = make_world(blocks=mix, n_private=8)
    with torch.no_grad():
        assert recovered(world) > 0.9


def test_progress_grows_to_1_over_all_sequences():
    told = []
    world = make_world(blocks=mix, n_private=20)
    recovered(world, steps=4, rounds=2, progress=told.append)
    assert told == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(("steps", "rounds"), [(10, 0), (3, 4), (0, 1)])
def test_too_few_steps_are_refused(steps, rounds):
    with pytest.raises(ValueError, match="take at least one round of one step"):
        GradientDescent(torch.ones(3, 2), mix, clipped, steps=steps, rounds=rounds)
