"""A server reads labels off the gradient of a head that it knows, and no longer once noise drowns them."""

import pytest
import torch

from splitfed.privacy.leakage.labels import Sending, label_result, log_frequencies, recover_labels
from tests.privacy.leakage.label_leaks import RealModel, e2e_rows, noisy, norm_and_head, output_gradient

V, B, T = 60, 6, 20


def sequences(D, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, generator=generator) * 3, torch.randint(V, (B, T), generator=generator)


def guess(gradient_BTD, hidden_BTD, head, sending, log_prior_V=None):
    prior = torch.zeros(V) if log_prior_V is None else log_prior_V
    found = recover_labels(gradient_BTD.flatten(0, 1), hidden_BTD.flatten(0, 1), head, sending, log_prior_V=prior)
    return found.labels_N.view(B, T), found.evidence_N.view(B, T)


@pytest.mark.parametrize("D", [8, 100])
@pytest.mark.parametrize(
    ("clipping_norm", "per"), [(None, "token"), (0.01, "token"), (0.01, "sequence")], ids=["none", "token", "sequence"]
)  # fmt: skip
def test_without_noise_every_label_is_read(D, clipping_norm, per):
    head, _ = norm_and_head(D, V)
    hidden, labels = sequences(D)
    gradient = noisy(output_gradient(head, hidden, labels, 1 / T), 0.0, clipping_norm=clipping_norm, per=per)
    sending = Sending(1 / T, clipping_norm or float("inf"), per)
    guessed, evidence = guess(gradient, hidden, head, sending)
    assert torch.equal(guessed, labels)
    assert (evidence > 0).all()


def test_a_row_without_loss_speaks_against_a_label():
    head, _ = norm_and_head(8, V)
    hidden, labels = sequences(8)
    labels[:, ::2] = -100
    std = 1e-3
    gradient = noisy(output_gradient(head, hidden, labels, 1 / T), std)
    guessed, evidence = guess(gradient, hidden, head, Sending(1 / T, noise_std=std), torch.full((V,), V).log().neg())
    assert torch.equal(evidence > 0, labels != -100)
    assert label_result("rows", guessed, labels).rate == 1


def test_noise_lowers_the_share_of_labels_down_to_chance():
    head, _ = norm_and_head(8, V)
    hidden, labels = sequences(8)
    labels = torch.where(torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.2, 7, labels)
    gradient, prior = output_gradient(head, hidden, labels, 1 / T), log_frequencies(labels, V)
    rates = []
    for std in (1e-3, 3e-2, 1e3):
        guessed, evidence = guess(noisy(gradient, std), hidden, head, Sending(1 / T, noise_std=std), prior)
        rates.append(label_result("rows", guessed, labels).rate)
    assert rates[0] == 1 > rates[1] > rates[2]
    assert (guessed == 7).all()
    assert evidence.abs().max() < 1e-3
    drowned = label_result("rows", guessed, labels)
    assert drowned.rate == drowned.chance == pytest.approx((labels == 7).float().mean().item())


def test_only_rows_with_a_label_are_counted():
    labels = torch.tensor([[3, 3, -100], [5, -100, -100], [-100, -100, -100]])
    result = label_result("rows", torch.tensor([[3, 4, 9], [5, 5, 5], [3, 3, 3]]), labels)
    assert (result.successes, result.trials, result.clusters) == (2, 3, ((1, 2), (1, 1)))
    assert result.chance == pytest.approx(2 / 3)
    assert result.target == "labels"


def test_a_result_needs_a_label():
    with pytest.raises(ValueError, match="at least one trial"):
        label_result("rows", torch.zeros(1, 2), torch.full((1, 2), -100))


def test_frequencies_leave_no_token_out():
    prior = log_frequencies(torch.tensor([2, 2, -100, 0]), 4).exp()
    assert torch.allclose(prior, torch.tensor([2.0, 1.0, 3.0, 1.0]) / 7)


def test_nearly_every_label_of_real_text_is_read_through_a_real_head(stories260k, e2e):
    model = RealModel(stories260k)
    public, private = (model.see(e2e_rows(e2e, 16, skip=skip), top_blocks=0) for skip in (16, 0))
    prior, top = log_frequencies(public.labels_BT, len(model.head_VD)), model.top(0)
    found = recover_labels(
        private.gradient_BTD.flatten(0, 1),
        private.hidden_BTD.flatten(0, 1),
        lambda rows_ND: top(rows_ND.unsqueeze(1)).squeeze(1),
        Sending(1 / model.tokens),
        log_prior_V=prior,
    )
    result = label_result("rows", found.labels_N.view(private.labels_BT.shape), private.labels_BT)
    assert result.rate > 0.95
    assert result.chance < 0.2
