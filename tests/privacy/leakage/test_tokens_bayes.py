"""The closest known row, and the most likely token."""

from dataclasses import replace

import pytest
import torch

from splitfed.privacy.leakage import metric_log_density
from splitfed.privacy.leakage.tokens_bayes import BayesAttack, NearestNeighbour
from splitfed.privacy.leakage.tokens_rows import KnownRows
from splitfed.privacy.leakage.tokens_score import score_tokens
from tests.privacy.leakage.token_world import clipped, make_world, mix


def nearest(world):
    return score_tokens(NearestNeighbour(KnownRows(world.public)), world.smashed_BTD, world.private, world.knowledge)


def bayes(world, before=None):
    public = world.public
    attack = BayesAttack(public, KnownRows(public), tokens_before=before)
    return score_tokens(attack, world.smashed_BTD, world.private, world.knowledge)


@pytest.mark.parametrize("places", [0.0, 1.0])
def test_without_noise_the_nearest_neighbour_recovers_every_token_at_cut_0(places):
    assert nearest(make_world(places=places)).rate == 1.0


def test_without_noise_the_nearest_public_row_recovers_nearly_every_token_deeper():
    assert nearest(make_world(blocks=mix, n_public=1000)).rate > 0.98


@pytest.mark.parametrize("std", [0.4, 0.8, 1.6])
def test_the_most_likely_token_has_the_hits_that_its_probability_promises(std):
    """If probabilities are right, hits are the sum of the probabilities of what was guessed."""
    world = make_world(std, n_public=3000, n_private=400)
    rows = clipped(world.table_VD[None])[0].double()
    share = torch.bincount(world.private.input_ids_BT[world.private.is_real], minlength=20).double()
    log_weight = -torch.cdist(world.smashed_BTD.double(), rows).square() / (2 * std**2) + share.log()
    promised = log_weight.softmax(-1).amax(-1)[world.private.is_real].mean().item()
    result = bayes(world, before=0)
    low, high = result.interval(0.99)
    assert low <= promised <= high
    assert result.attack == "bayes"


@pytest.mark.parametrize("std", [0.8, 1.6])
def test_context_recovers_more_than_a_row_alone_and_that_more_than_the_nearest_neighbour(std):
    world = make_world(std, n_private=300)
    assert bayes(world).attack == "bayes in context"
    assert bayes(world).interval()[0] > bayes(world, before=0).interval()[1]
    assert bayes(world, before=0).rate > nearest(world).rate + 0.02


def test_deeper_the_public_rows_of_a_token_stand_in_for_its_rows():
    world = make_world(0.6, blocks=mix, n_public=1000)
    assert bayes(world, before=0).rate > nearest(world).rate + 0.02


def test_how_far_the_prior_looks_back_is_what_recovers_most_of_held_out_public_text():
    clear, drowned = make_world(0.8), make_world(1e4)
    assert BayesAttack(clear.public, KnownRows(clear.public)).tokens_before > 0
    attack = BayesAttack(drowned.public, KnownRows(drowned.public))
    hits = [score_held_out(drowned, before) for before in (0, 1, 2)]
    assert hits[attack.tokens_before] == max(hits)


def score_held_out(world, before):
    public = world.public
    guess = BayesAttack(public, KnownRows(public), tokens_before=before).recover(public.held_out_BTD)
    return int((guess == public.held_out_states_BT).sum())


def test_under_metric_noise_its_own_density_recovers_more_than_the_nearest_neighbour():
    eta, world = 4.0, make_world(n_private=300)
    noise = torch.Generator().manual_seed(5)

    def release(x_BTD):
        direction = torch.nn.functional.normalize(torch.randn(x_BTD.shape, generator=noise), dim=-1)
        radius = torch.distributions.Gamma(8.0, eta).sample(x_BTD.shape[:2])
        return clipped(x_BTD) + radius.unsqueeze(-1) * direction

    knowledge = replace(world.knowledge, release=release, log_density=metric_log_density(eta))
    smashed = release(knowledge.bottom(world.private.input_ids_BT))
    noisy = replace(world, knowledge=knowledge, smashed_BTD=smashed)
    assert nearest(noisy).rate < 0.9
    assert bayes(noisy, before=0).rate > nearest(noisy).rate
    assert bayes(noisy).rate > bayes(noisy, before=0).rate + 0.02


@pytest.mark.parametrize("blocks", [None, mix])
def test_overwhelming_noise_leaves_no_more_than_chance(blocks):
    world = make_world(1e4, blocks=blocks)
    for result in (nearest(world), bayes(world, before=0), bayes(world)):
        assert not result.beats_chance(0.99)


def test_with_noise_off_there_is_no_density():
    public = make_world().public
    with pytest.raises(ValueError, match="take the nearest neighbour instead"):
        BayesAttack(public, KnownRows(public))
