"""Public text to learn from, and public text to try oneself on."""

from dataclasses import replace

import pytest
import torch

from splitfed.privacy.leakage import Texts
from splitfed.privacy.leakage.tokens_public import PublicReleases
from tests.privacy.leakage.token_world import clipped, make_world


def test_a_tenth_of_the_texts_is_held_out_and_not_learned_from():
    knowledge = make_world().knowledge
    ids = torch.arange(50).repeat_interleave(12).view(50, 12)  # each text its own token
    knowledge = replace(
        knowledge,
        bottom=lambda ids_BT: torch.nn.functional.one_hot(ids_BT, 50).float(),
        public=Texts(ids, torch.full((50,), 12)),
        vocabulary=50,
    )
    public = PublicReleases(knowledge)
    held_out, learned = public.held_out_states_BT[:, 0].tolist(), public.states_BT[:, 0].tolist()
    assert len(held_out) == 5
    assert sorted(held_out + learned) == list(range(50))
    assert public.held_out_BTD.argmax(-1)[:, 0].tolist() == held_out
    assert PublicReleases(knowledge, seed=1).held_out_states_BT[:, 0].tolist() != held_out


def test_padding_is_a_state_of_its_own():
    world = make_world()
    public = world.public
    padded = sum(12 - length for length in world.knowledge.public.lengths_B.tolist())
    assert sum(int((part == 20).sum()) for part in (public.states_BT, public.held_out_states_BT)) == padded


def test_each_batch_is_released_afresh():
    public = make_world(0.5).public
    (first, states), (second, same_states) = (public.batch(4, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(states, same_states)
    assert (first != second).all()
    assert (first - second).std().item() == pytest.approx(0.5 * 2**0.5, rel=0.1)


def test_the_moments_are_those_of_rows_about_the_mean_of_their_token():
    """The clipped rows of a token are one row here, so that nothing but noise is left about it."""
    world = make_world(0.3, vocabulary=5, n_public=600)
    means_WD, middle_D, within_DD = world.public.moments()
    rows = clipped(world.table_VD[None])[0]
    assert torch.allclose(means_WD[1:5], rows[1:], atol=0.02)
    assert torch.allclose(middle_D, world.public.clipped_BTD.mean((0, 1)), atol=1e-6)
    assert torch.allclose(within_DD, 0.09 * torch.eye(8, dtype=torch.float64), atol=0.01)


def test_one_public_text_is_too_few():
    knowledge = make_world().knowledge
    one = Texts(knowledge.public.input_ids_BT[:1], knowledge.public.lengths_B[:1])
    with pytest.raises(ValueError, match="at least 2 public texts, one of them to try itself on, not 1"):
        PublicReleases(replace(knowledge, public=one))
