"""What a server knows that wants tokens."""

import pytest
import torch

from splitfed.privacy.leakage import Texts, gaussian_log_density, metric_log_density
from tests.privacy.leakage.token_world import make_world


def test_a_token_is_real_up_to_the_length_of_its_text():
    texts = Texts(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 3]))
    assert texts.is_real.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize(
    ("ids", "lengths"), [((2, 3), [1]), ((6,), [1]), ((2, 3), [0, 1]), ((2, 3), [4, 1]), ((2, 3), [[1], [1]])]
)
def test_texts_that_do_not_fit_their_lengths_are_refused(ids, lengths):
    with pytest.raises(ValueError, match=r"Texts are token ids \[B, T\]|A text has from 1 to 3 real tokens"):
        Texts(torch.zeros(ids, dtype=torch.int64), torch.tensor(lengths))


def test_the_gaussian_density_is_that_of_every_element_up_to_a_constant():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(0.0, 0.3).log_prob(rows).sum(-1)
    difference = gaussian_log_density(0.3)(rows.norm(dim=-1)) - expected
    assert torch.allclose(difference, difference[0].expand(5), atol=1e-4)


def test_the_metric_density_falls_by_eta_for_each_unit_of_length():
    assert metric_log_density(3.0)(torch.tensor([0.0, 1.0, 2.5])).tolist() == [0.0, -3.0, -7.5]


@pytest.mark.parametrize("density", [gaussian_log_density, metric_log_density])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_density_of_no_noise_is_refused(density, value):
    with pytest.raises(ValueError, match="with noise off leave the density out"):
        density(value)


def test_the_bottom_runs_in_parts_and_without_gradients():
    table = torch.randn(9, 4, requires_grad=True)
    seen = []

    def bottom(ids):
        seen.append(len(ids))
        return table[ids]

    knowledge = make_world().knowledge
    knowledge = type(knowledge)(bottom, knowledge.release, knowledge.clip, knowledge.public, 9)
    ids = torch.arange(9).repeat(3000 // 9, 1)
    hidden = knowledge.hidden(ids)
    assert torch.equal(hidden, table[ids])
    assert not hidden.requires_grad
    assert len(seen) > 1
    assert sum(seen) == len(ids)
