"""Attacks that learn come up to the best there can be."""

import pytest
import torch

from splitfed.privacy.leakage.tokens_bayes import BayesAttack
from splitfed.privacy.leakage.tokens_inverter import LinearProbe, TransformerReader, learn_to_invert
from splitfed.privacy.leakage.tokens_rows import KnownRows
from splitfed.privacy.leakage.tokens_score import score_tokens
from tests.privacy.leakage.token_world import make_world, mix


def rates(world, **options):
    learned = list(learn_to_invert(world.public, **options))
    return [score_tokens(each, world.smashed_BTD, world.private, world.knowledge).rate for each in learned]


@pytest.mark.parametrize("blocks", [None, mix])
def test_without_noise_they_recover_nearly_every_token(blocks):
    probe, transformer = rates(make_world(blocks=blocks, n_public=600), max_steps=150)
    assert probe > 0.9
    assert transformer > 0.98


@pytest.mark.parametrize("std", [0.3, 0.8, 1.6])
def test_under_noise_at_cut_0_they_come_within_2_points_of_the_most_likely_token(std):
    """From nearly every token to less than half of them."""
    world = make_world(std, n_public=1000, n_private=200)
    yardstick = BayesAttack(world.public, KnownRows(world.public))
    best = score_tokens(yardstick, world.smashed_BTD, world.private, world.knowledge).rate
    assert min(rates(world, max_steps=50)) > best - 0.02


def test_the_probe_starts_as_the_best_linear_reader_under_gaussian_noise():
    world = make_world(0.8, n_public=1500, n_private=300)
    public = world.public
    guess = LinearProbe(public)(world.smashed_BTD)[..., :-1].argmax(-1)
    hits = (guess == world.private.input_ids_BT)[world.private.is_real].float().mean().item()
    attack = BayesAttack(public, KnownRows(public), tokens_before=0)
    best = score_tokens(attack, world.smashed_BTD, world.private, world.knowledge).rate
    assert hits == pytest.approx(best, abs=0.01)


def test_the_transformer_starts_as_the_probe():
    public = make_world(0.3).public
    probe = LinearProbe(public)
    smashed = public.held_out_BTD
    assert torch.equal(TransformerReader(probe, tokens=12)(smashed), probe(smashed))


def test_equal_knowledge_and_seeds_give_equal_guesses_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    guesses = []
    for _ in range(2):
        world = make_world(0.8, n_public=100)
        guesses.append([each.recover(world.smashed_BTD) for each in learn_to_invert(world.public, max_steps=20)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first, second) for first, second in zip(*guesses, strict=True))


def test_overwhelming_noise_leaves_no_more_than_chance():
    world = make_world(1e4)
    for attack in learn_to_invert(world.public, max_steps=50):
        result = score_tokens(attack, world.smashed_BTD, world.private, world.knowledge)
        assert not result.beats_chance(0.99), attack.name


def test_rows_that_never_differ_give_nothing_but_the_most_frequent_token():
    world = make_world()
    world.table_VD.fill_(1.0)
    probe = next(learn_to_invert(world.public, max_steps=50))
    assert probe.recover(torch.ones(1, 12, 8)).shape == (1, 12)


def test_progress_names_each_attack():
    told = []
    list(learn_to_invert(make_world(n_public=50).public, max_steps=5, progress=lambda *each: told.append(each)))
    assert told == [("linear probe", 1.0), ("transformer", 1.0)]


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"batch_size": 0}, {"layers": 0}, {"width": 0}, {"width": 40}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1 step, sequence and layer"):
        next(learn_to_invert(make_world().public, **wrong))
