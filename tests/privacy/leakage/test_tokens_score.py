"""Hits are counted over real tokens, beside those of a guess without looking."""

import pytest
import torch

from splitfed.privacy.leakage import Texts, TokenKnowledge
from splitfed.privacy.leakage.tokens_score import blind_guess, score_tokens


class Always:
    name = "always the same"

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def recover(self, smashed_BTD):
        return self.tokens.expand(smashed_BTD.shape[:2])


def texts(ids, lengths):
    return Texts(torch.tensor(ids), torch.tensor(lengths))


def knowledge_of(public):
    return TokenKnowledge(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity(), public, 10)


def test_padding_is_no_trial_whatever_is_guessed_there():
    public = texts([[1, 2, 3]] * 2, [3, 3])
    private = texts([[1, 7, 0], [1, 2, 3]], [1, 3])
    result = score_tokens(Always([1, 7, 3]), torch.zeros(2, 3, 4), private, knowledge_of(public))
    assert result.clusters == ((1, 1), (2, 3))
    assert (result.attack, result.target) == ("always the same", "tokens")


def test_chance_is_the_rate_of_each_places_most_frequent_public_token_on_private_text():
    public = texts([[1, 2, 3, 4], [1, 2, 9, 9]] * 40 + [[1, 2, 3, 3]] * 5, [4, 2] * 40 + [4] * 5)
    assert blind_guess(public, 10).tolist() == [1, 2, 3, 4]
    private = texts([[1, 5, 3, 4], [6, 2, 0, 0]], [4, 2])
    result = score_tokens(Always([0, 0, 0, 0]), torch.zeros(2, 4, 4), private, knowledge_of(public))
    assert result.chance == pytest.approx(4 / 6)


def test_a_place_that_few_public_texts_reach_gets_the_most_frequent_token():
    public = texts([[5, 5, 5, 0]] * 50 + [[5, 5, 5, 8]], [3] * 50 + [4])
    assert blind_guess(public, 10).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 2, 4)])
def test_smashed_data_of_other_texts_is_refused(shape):
    public = texts([[1, 2, 3]] * 2, [3, 3])
    with pytest.raises(ValueError, match="is not that of texts"):
        score_tokens(Always([1, 2, 3]), torch.zeros(shape), public, knowledge_of(public))


def test_texts_of_another_length_than_the_public_ones_are_refused():
    public, private = texts([[1, 2, 3]] * 2, [3, 3]), texts([[1, 2]], [2])
    with pytest.raises(ValueError, match="padded to the 3 tokens of the public ones"):
        score_tokens(Always([1, 2]), torch.zeros(1, 2, 4), private, knowledge_of(public))
