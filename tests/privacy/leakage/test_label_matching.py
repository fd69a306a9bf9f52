"""Blocks in the top do not keep labels from a server that knows their weights."""

import pytest
import torch
import torch.nn.functional as F

from splitfed.privacy.leakage.label_matching import match_labels
from splitfed.privacy.leakage.labels import Sending, label_result, log_frequencies
from tests.privacy.leakage.label_leaks import RealModel, e2e_rows, noisy, norm_and_head, output_gradient

V, B, T, D = 40, 5, 12, 32


@pytest.fixture
def top():
    """A causal attention block, then norm and head."""
    head, _ = norm_and_head(D, V)
    weights = torch.randn(3, D, D, generator=torch.Generator().manual_seed(3)) / D**0.5

    def forward(x_BTD):
        q, k, v = (F.rms_norm(x_BTD, (D,)) @ weight for weight in weights)
        return head(x_BTD + F.scaled_dot_product_attention(q, k, v, is_causal=True))

    return forward


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, :4] = -100
    return torch.randn(B, T, D, generator=generator) * 2, labels


@pytest.mark.parametrize(("clipping_norm", "per"), [(None, "token"), (0.02, "token"), (0.05, "sequence")])
def test_without_noise_nearly_every_label_is_found(top, sequences, clipping_norm, per):
    hidden, labels = sequences
    gradient = output_gradient(top, hidden, labels, 1 / T)
    if clipping_norm is not None:
        norms = gradient.norm(dim=-1) if per == "token" else gradient.flatten(1).norm(dim=1)
        assert (norms > clipping_norm).float().mean() > 0.3, "the clip must bite"
    sent = noisy(gradient, 0.0, clipping_norm=clipping_norm, per=per)
    sending = Sending(1 / T, clipping_norm or float("inf"), per)
    guessed = match_labels(sent, hidden, top, sending, log_prior_V=torch.full((V,), V).log().neg())
    assert label_result("matching", guessed, labels).rate >= 0.95


def test_drowned_in_noise_the_guess_is_the_most_frequent_label(top, sequences):
    hidden, labels = sequences
    labels[:, ::3] = 7
    prior = log_frequencies(labels, V)
    std = 100.0
    sent = noisy(output_gradient(top, hidden, labels, 1 / T), std)
    guessed = match_labels(sent, hidden, top, Sending(1 / T, noise_std=std), log_prior_V=prior)
    assert (guessed == 7).all()


def test_what_is_known_of_the_mask_helps(top, sequences):
    hidden, labels = sequences
    std = 0.03
    prior = torch.full((V,), V).log().neg()
    sent = noisy(output_gradient(top, hidden, labels, 1 / T), std)
    carries = (labels != -100).float()
    rates = []
    for known in (carries, 1 - carries):
        guessed = match_labels(
            sent, hidden, top, Sending(1 / T, noise_std=std), log_prior_V=prior, carries_loss_BT=known
        )
        rates.append(label_result("matching", guessed, labels).rate)
    assert rates[0] > rates[1]


def test_a_gradient_of_zeros_without_noise_is_taken(top, sequences):
    hidden, _ = sequences
    guessed = match_labels(torch.zeros(B, T, D), hidden, top, Sending(1 / T), log_prior_V=torch.zeros(V))
    assert guessed.shape == (B, T)


@pytest.mark.parametrize("top_blocks", [1, 2])
def test_nearly_every_label_of_real_text_is_read_through_real_blocks(stories260k, e2e, top_blocks):
    model = RealModel(stories260k)
    public, private = (
        model.see(e2e_rows(e2e, count, skip=skip), top_blocks=top_blocks) for count, skip in ((16, 6), (4, 0))
    )
    guessed = match_labels(
        private.gradient_BTD,
        private.hidden_BTD,
        model.top(top_blocks),
        Sending(1 / model.tokens),
        log_prior_V=log_frequencies(public.labels_BT, len(model.head_VD)),
    )
    assert label_result("matching", guessed, private.labels_BT).rate > 0.95
