"""A network learns from public text what an output gradient says of its label."""

import pytest
import torch

from splitfed.privacy.leakage.label_probe import LabelProbe
from splitfed.privacy.leakage.labels import label_result, log_frequencies
from tests.privacy.leakage.label_leaks import RealModel, e2e_rows, noisy, norm_and_head, output_gradient

V, D = 30, 16


@pytest.fixture
def rows():
    """Public and private rows of output gradients, with their labels, and the head's weight."""
    head, weight_VD = norm_and_head(D, V)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 3000, D, generator=generator)
    labels = torch.randint(V, (1, 3000), generator=generator)
    labels[:, ::4] = 5
    gradient = output_gradient(head, hidden, labels, 0.01)
    return gradient[0], labels[0], weight_VD


def learn(gradient_ND, labels_N, weight_VD, **options):
    return LabelProbe(gradient_ND, labels_N, head_VD=weight_VD, log_prior_V=log_frequencies(labels_N, V), **options)


def test_labels_of_rows_that_it_never_saw_are_found(rows):
    gradient, labels, weight = rows
    probe = learn(gradient[:2000], labels[:2000], weight)
    result = label_result("probe", probe.guess(gradient[2000:])[None], labels[None, 2000:])
    assert result.rate > 0.9
    assert result.chance < 0.35


def test_noise_lets_it_fall_back_to_the_most_frequent_label(rows):
    gradient, labels, weight = rows
    drowned = noisy(gradient, 100.0)
    guessed = learn(drowned[:2000], labels[:2000], weight).guess(drowned[2000:])
    assert (guessed == 5).all()


def test_the_length_of_a_row_does_not_matter(rows):
    gradient, labels, weight = rows
    probe = learn(gradient[:500], labels[:500], weight)
    assert torch.equal(probe.guess(gradient[500:]), probe.guess(1e-6 * gradient[500:]))


def test_the_same_seed_gives_the_same_guesses_and_advances_no_other_generator(rows):
    gradient, labels, weight = rows
    before = torch.random.get_rng_state()
    one, other = (learn(gradient[:400], labels[:400], weight, seed=3).guess(gradient[400:]) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_needs_rows_to_learn_from(rows):
    gradient, labels, weight = rows
    with pytest.raises(ValueError, match="2 rows or more, not 1"):
        learn(gradient[:1], labels[:1], weight)


def test_labels_of_real_text_are_found_through_a_block(stories260k, e2e):
    model = RealModel(stories260k)
    public, private = (model.see(e2e_rows(e2e, count, skip=skip), top_blocks=1) for count, skip in ((64, 8), (8, 0)))
    has_label_BT = public.labels_BT != -100
    probe = LabelProbe(
        public.gradient_BTD[has_label_BT],
        public.labels_BT[has_label_BT],
        head_VD=model.head_VD,
        log_prior_V=log_frequencies(public.labels_BT, len(model.head_VD)),
    )
    guessed = probe.guess(private.gradient_BTD.flatten(0, 1)).view(private.labels_BT.shape)
    result = label_result("probe", guessed, private.labels_BT)
    assert result.rate > 0.8
    assert result.interval()[0] > result.chance
