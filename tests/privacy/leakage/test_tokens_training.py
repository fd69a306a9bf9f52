"""Training ends by itself, with what was best."""

import pytest
import torch

from splitfed.privacy.leakage.tokens_inverter import LinearProbe
from splitfed.privacy.leakage.tokens_training import held_out_loss, train
from tests.privacy.leakage.token_world import make_world


def linear(public):
    torch.manual_seed(0)
    return torch.nn.Linear(8, public.n_states)


def test_training_lowers_the_loss_on_text_that_was_not_learned_from():
    public = make_world(0.1).public
    network = linear(public)
    before = held_out_loss(network, public)
    assert train(network, public, rate=5e-2, max_steps=200) == 200
    assert held_out_loss(network, public) < before / 3


def test_a_rate_that_ruins_the_network_leaves_it_as_it_was():
    public = make_world(0.3).public
    network = LinearProbe(public)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    steps = train(network, public, rate=1e3, max_steps=1000)
    assert steps == 150  # no gain, slower, no gain, slower, no gain
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_stops_by_itself_where_there_is_nothing_left_to_gain():
    public = make_world(1.0).public
    network, told = LinearProbe(public), []
    assert train(network, public, rate=1e-2, max_steps=5000, progress=told.append) < 1000
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_progress_ends_at_1_where_all_steps_are_taken():
    public, told = make_world(0.1).public, []
    train(linear(public), public, rate=1e-2, max_steps=120, progress=told.append)
    assert told == pytest.approx([50 / 120, 100 / 120, 1.0])


def test_a_large_vocabulary_trains_on_some_rows_of_a_batch(monkeypatch):
    public = make_world(0.1).public
    network = linear(public)
    before = held_out_loss(network, public)
    monkeypatch.setattr("splitfed.privacy.leakage.tokens_training._LOGITS_AT_ONCE", 21 * 40)
    train(network, public, rate=5e-2, max_steps=100)
    assert held_out_loss(network, public) < before / 2


def test_the_seed_decides_the_batches():
    def trained(seed):
        public = make_world().public
        network = linear(public)
        train(network, public, rate=1e-2, max_steps=10, seed=seed)
        return network.weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
