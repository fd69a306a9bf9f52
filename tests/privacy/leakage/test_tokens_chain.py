"""What follows what, and what it says together with the rows."""

from itertools import pairwise

import pytest
import torch

from splitfed.privacy.leakage.tokens_chain import ChainPrior
from tests.privacy.leakage.enumerate_texts import posterior_by_enumeration

STATES = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 0], [2, 1, 3, 3], [1, 2, 2, 1], [0, 1, 2, 1]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transitions(states, W):
    """As the code has it: (count + 5 · share) / (total + 5), and shares of counts that are each 0.1 larger."""
    share = torch.bincount(states.flatten(), minlength=W).double() + 0.1
    share = share / share.sum()
    counts = torch.zeros(W, W, dtype=torch.float64)
    for row in states.tolist():
        for before, after in pairwise(row):
            counts[before, after] += 1
    first = torch.bincount(states[:, 0], minlength=W).double() + 0.1 * share
    return first / first.sum(), (counts + 5 * share) / (counts.sum(1, keepdim=True) + 5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_the_posterior_is_the_exact_one(scale):
    first, move = transitions(STATES, 4)
    log_likelihood = scale * normal(3, 5, 4)

    def probability(text):
        value = first[text[0]].item()
        for before, after in pairwise(text):
            value *= move[before, after].item()
        return value

    found = ChainPrior(STATES, 4).posterior(log_likelihood)
    for found_TW, log_likelihood_TW in zip(found, log_likelihood, strict=True):
        assert torch.allclose(found_TW.double(), posterior_by_enumeration(log_likelihood_TW, probability), atol=1e-5)


def test_the_probability_of_what_follows_is_the_same_for_a_few_states_as_for_all():
    _, move = transitions(STATES, 4)
    before, after = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[1, 3], [0, 0]])
    found = ChainPrior(STATES, 4).follow(before, after)
    assert torch.allclose(found.double(), move[before[:, :, None], after[:, None, :]], atol=1e-6)


def test_padding_is_never_guessed():
    log_likelihood = torch.zeros(1, 4, 4)
    log_likelihood[..., 3] = 50.0
    assert (ChainPrior(STATES, 4).most_likely(log_likelihood) < 3).all()


def test_a_constant_of_a_row_changes_nothing():
    prior, log_likelihood = ChainPrior(STATES, 4), normal(2, 4, 4)
    shifted = log_likelihood + 300 * normal(2, 4, 1, seed=1)
    assert torch.allclose(prior.posterior(log_likelihood), prior.posterior(shifted), atol=1e-4)


def test_rows_that_contradict_all_public_text_still_have_a_posterior():
    log_likelihood = torch.full((1, 4, 4), -torch.inf)
    for place, state in enumerate((2, 0, 2, 0)):  # no pair of these was seen
        log_likelihood[0, place, state] = 0.0
    assert ChainPrior(STATES, 4).most_likely(log_likelihood).tolist() == [[2, 0, 2, 0]]


def test_a_vocabulary_of_a_hundred_thousand_needs_no_square_table():
    states = torch.randint(100_001, (20, 8), generator=torch.Generator().manual_seed(0))
    log_likelihood = torch.zeros(1, 8, 100_001)
    log_likelihood[0].scatter_(1, states[:1].T, 30.0)
    assert torch.equal(ChainPrior(states, 100_001).most_likely(log_likelihood), states[:1])
