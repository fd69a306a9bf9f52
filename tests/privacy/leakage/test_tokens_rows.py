"""Rows of smashed data beside rows whose token is known."""

import pytest
import torch

from splitfed.privacy.leakage.tokens_rows import KnownRows
from tests.privacy.leakage.token_world import clipped, make_world, mix


@pytest.mark.parametrize("places", [0.0, 1.0])
def test_at_cut_0_the_distance_to_every_token_at_the_same_place_is_exact(places):
    world = make_world(places=places)
    distances = KnownRows(world.public).score(world.smashed_BTD, lambda distance: distance, is_sum=True)
    every = torch.arange(20)[:, None].expand(20, 12)
    rows_VTD = clipped(world.knowledge.bottom(every))
    expected = (world.smashed_BTD.unsqueeze(2) - rows_VTD.transpose(0, 1)).norm(dim=-1)
    assert torch.allclose(distances[..., :20], expected, atol=2e-3)


@pytest.mark.parametrize("places", [0.0, 1.0])
def test_a_large_vocabulary_is_gone_through_in_parts(places, monkeypatch):
    world = make_world(places=places)
    whole = KnownRows(world.public).score(world.smashed_BTD, torch.neg, is_sum=True)
    monkeypatch.setattr("splitfed.privacy.leakage.tokens_rows._ELEMENTS_AT_ONCE", 7 * 12 * 8)
    assert torch.allclose(KnownRows(world.public).score(world.smashed_BTD, torch.neg, is_sum=True), whole, atol=2e-3)


def test_at_cut_0_padding_fits_as_well_as_the_token_it_is_made_of():
    world = make_world()
    scores = KnownRows(world.public).score(world.smashed_BTD, torch.neg, is_sum=True)
    assert torch.equal(scores[..., 20], scores[..., 0])


def test_where_no_public_text_is_padded_padding_fits_nothing():
    world = make_world()
    world.knowledge.public.lengths_B.fill_(12)
    scores = KnownRows(world.public).score(world.smashed_BTD, torch.neg, is_sum=True)
    assert (scores[..., 20] == -torch.inf).all()


@pytest.mark.parametrize("is_sum", [True, False])
def test_deeper_every_token_is_scored_by_its_rows_in_public_text(is_sum):
    world = make_world(blocks=mix)
    public = world.public
    scores = KnownRows(public, seed=3).score(world.smashed_BTD[:2], torch.neg, is_sum=is_sum)
    usual = public.states_BT.flatten()
    distances = torch.cdist(world.smashed_BTD[:2].flatten(0, 1), public.clipped_BTD.flatten(0, 1))
    for token in range(21):
        mine = -distances[:, usual == token]
        expected = mine.logsumexp(-1) - torch.tensor(mine.shape[1]).log() if is_sum else mine.amax(-1)
        # A few rows more than those of public text: the text in which every token occurs.
        found = scores.flatten(0, 1)[:, token]
        assert (found - expected).abs().median() < 0.05, token
        assert is_sum or (found >= expected - 1e-3).all()


def test_deeper_a_token_that_no_public_text_holds_is_known_from_a_text_of_every_token():
    world = make_world(blocks=mix)
    world.knowledge.public.input_ids_BT.remainder_(19)
    scores = KnownRows(world.public).score(world.smashed_BTD, torch.neg, is_sum=False)
    assert scores.isfinite().all()
    assert (scores[..., :20].argmax(-1) == 19).any()


def test_deeper_no_more_public_rows_are_compared_with_than_asked_for():
    world = make_world(blocks=mix)
    seen = []

    def remember(distance):
        seen.append(distance.shape[-1])
        return -distance

    KnownRows(world.public, max_public_rows=50).score(world.smashed_BTD, remember, is_sum=False)
    assert set(seen) == {50 + 24}  # every one of 20 tokens fills two texts of 12
