"""What follows which two, and what it says together with the rows."""

import pytest
import torch

from splitfed.privacy.leakage.tokens_chain import ChainPrior
from splitfed.privacy.leakage.tokens_context import TextPrior
from tests.privacy.leakage.enumerate_texts import posterior_by_enumeration
from tests.privacy.leakage.test_tokens_chain import STATES, normal, transitions
from tests.privacy.leakage.token_world import draw_texts


def probability_of(states, W):
    """As the docstring has it: (count + 3 · probability after the last one) / (total + 3)."""
    first, move = transitions(states, W)
    pairs, triples = {}, {}
    for row in states.tolist():
        for before, last, now in zip(row, row[1:], row[2:], strict=False):
            pairs[before, last] = pairs.get((before, last), 0) + 1
            triples[before, last, now] = triples.get((before, last, now), 0) + 1

    def probability(text):
        value = first[text[0]].item()
        if len(text) > 1:
            value *= move[text[0], text[1]].item()
        for before, last, now in zip(text, text[1:], text[2:], strict=False):
            count, total = triples.get((before, last, now), 0), pairs.get((before, last), 0)
            value *= (count + 3 * move[last, now].item()) / (total + 3)
        return value

    return probability


@pytest.mark.parametrize("tokens", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_with_two_tokens_before_the_guess_is_the_most_likely_token_given_all_rows(tokens, scale):
    log_likelihood = scale * normal(6, tokens, 4)
    probability = probability_of(STATES, 4)
    expected = [posterior_by_enumeration(each, probability)[:, :3].argmax(-1) for each in log_likelihood]
    assert torch.equal(TextPrior(STATES, 4).guess(log_likelihood, 2), torch.stack(expected))


def test_with_one_token_before_the_guess_is_the_chains():
    log_likelihood = normal(6, 5, 4)
    assert torch.equal(TextPrior(STATES, 4).guess(log_likelihood, 1), ChainPrior(STATES, 4).most_likely(log_likelihood))


def test_with_no_token_before_a_token_is_as_likely_as_it_is_frequent():
    prior, log_likelihood = TextPrior(STATES, 4), normal(6, 5, 4)
    expected = log_likelihood + (torch.bincount(STATES.flatten()) + 0.1).log()
    assert torch.equal(prior.guess(log_likelihood, 0), expected[..., :3].argmax(-1))


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_is_never_guessed(before, tokens):
    log_likelihood = torch.zeros(2, tokens, 4)
    log_likelihood[..., 3] = 50.0
    assert (TextPrior(STATES, 4).guess(log_likelihood, before) < 3).all()


def test_more_states_than_candidates_are_narrowed_to_those_that_fit():
    """Rows that leave no doubt are read right, wherever their tokens are in a large vocabulary."""
    states = torch.randint(501, (50, 9), generator=torch.Generator().manual_seed(0))
    log_likelihood = torch.zeros(5, 9, 501)
    truth = torch.randint(500, (5, 9), generator=torch.Generator().manual_seed(1))
    log_likelihood.scatter_(2, truth.unsqueeze(-1), 40.0)
    assert torch.equal(TextPrior(states, 501).guess(log_likelihood, 2), truth)


def test_sequences_do_not_influence_each_other():
    prior, log_likelihood = TextPrior(STATES, 4), normal(6, 5, 4)
    alone = torch.cat([prior.guess(each[None], 2) for each in log_likelihood])
    assert torch.equal(prior.guess(log_likelihood, 2), alone)


def test_context_that_two_tokens_give_and_one_does_not_is_used():
    """0 1 is followed by 2, and 3 1 by 4: the last token alone does not tell."""
    states = torch.tensor([[0, 1, 2], [3, 1, 4]] * 30)
    log_likelihood = torch.zeros(2, 3, 6)
    log_likelihood[0, 0, 0] = log_likelihood[1, 0, 3] = 20.0
    assert TextPrior(states, 6).guess(log_likelihood, 2)[:, 2].tolist() == [2, 4]
    assert TextPrior(states, 6).guess(log_likelihood, 1)[:, 2].unique().numel() == 1


def test_hits_are_counted_over_tokens_and_not_over_padding():
    texts = draw_texts(20, 6, 5, seed=0)
    states = texts.input_ids_BT.where(texts.is_real, 5)
    log_likelihood = 40.0 * torch.nn.functional.one_hot(states, 6).float()
    assert TextPrior(states, 6).count_hits(log_likelihood, states, 1) == int(texts.lengths_B.sum())
