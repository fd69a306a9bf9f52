"""Server optimisers against a plain reimplementation, one element at a time."""

import math

import pytest
import torch

from splitfed.federation import Update
from tests.federation.aggregate.adapters import aggregate, assert_same_bits, initial, make, trained

SETTINGS = {"server_learning_rate": 0.3, "momentum": 0.8, "beta2": 0.95, "tau": 0.02}


class Plain:
    """One number, as Algorithm 2 of Reddi et al. 2021 has it; FedAvgM as in Hsu et al. 2019."""

    def __init__(self, optimiser, x, *, server_learning_rate, momentum, beta2=0.0, tau=0.0):
        self.optimiser, self.x = optimiser, x
        self.eta, self.beta1, self.beta2, self.tau = server_learning_rate, momentum, beta2, tau
        self.m, self.v = 0.0, tau**2

    def step(self, mean):
        delta = mean - self.x
        if self.optimiser == "fedavgm":
            self.m = self.beta1 * self.m + delta
            self.x += self.eta * self.m
            return
        self.m = self.beta1 * self.m + (1 - self.beta1) * delta
        if self.optimiser == "fedadam":
            self.v = self.beta2 * self.v + (1 - self.beta2) * delta**2
        else:
            sign = (self.v > delta**2) - (self.v < delta**2)
            self.v -= (1 - self.beta2) * delta**2 * sign
        self.x += self.eta * self.m / (math.sqrt(self.v) + self.tau)


@pytest.mark.parametrize("optimiser", ["fedavgm", "fedadam", "fedyogi"])
def test_several_rounds_are_those_of_the_algorithm(optimiser):
    settings = dict(list(SETTINGS.items())[: 2 if optimiser == "fedavgm" else 4])
    adapter = initial()
    plain = {
        key: [Plain(optimiser, x, **settings) for x in tensor.flatten().tolist()] for key, tensor in adapter.items()
    }
    aggregator = make(server_optimiser=optimiser, **settings)
    for round in range(1, 7):
        states = [trained(adapter, 10 * round + n, size=0.3 / round) for n in range(3)]
        updates = [(str(n), Update(state, n + 1)) for n, state in enumerate(states)]
        adapter = aggregate(aggregator, adapter, updates, round).adapter
        for key, numbers in plain.items():
            mean = (states[0][key].double() + 2 * states[1][key].double() + 3 * states[2][key].double()) / 6
            for number, element in zip(numbers, mean.flatten().tolist(), strict=True):
                number.step(element)
            expected = torch.tensor([number.x for number in numbers], dtype=torch.float64)
            torch.testing.assert_close(adapter[key].double().flatten(), expected, rtol=0, atol=2e-6)


def test_fedavgm_without_momentum_gives_the_mean():
    base = trained(initial(), 9)
    updates = [(str(n), Update(trained(base, n), n + 1)) for n in range(3)]
    stepped = aggregate(make(server_optimiser="fedavgm", momentum=0.0), base, updates).adapter
    mean = aggregate(make(), base, updates).adapter
    assert_same_bits(stepped, mean)


@pytest.mark.parametrize(("optimiser", "step"), [("fedavgm", 3.0), ("fedadam", 0.01), ("fedyogi", 0.01)])
def test_a_first_step_at_the_learning_rate_that_is_left_out(optimiser, step):
    """A change of 3 is 0.3 of a first moment, and of a second one of 0.09: a step of the learning rate but for tau."""
    base, update = {"x": torch.zeros(1)}, Update({"x": torch.full((1,), 3.0)}, 1)
    moved = aggregate(make(server_optimiser=optimiser), base, [("a", update)]).adapter["x"].item()
    assert moved == pytest.approx(step, rel=0.01)


def test_moments_of_what_nobody_trained_wait():
    base = {"x": torch.tensor([1.0]), "y": torch.tensor([1.0])}
    aggregator = make(server_optimiser="fedavgm", momentum=0.5)
    both = {"x": torch.tensor([2.0]), "y": torch.tensor([2.0])}
    adapter = aggregate(aggregator, base, [("a", Update(both, 1))]).adapter
    adapter = aggregate(aggregator, adapter, [("a", Update({"x": adapter["x"]}, 1))], 2).adapter
    assert (adapter["x"].item(), adapter["y"].item()) == (2.5, 2.0)
    assert {name: tensor.item() for name, tensor in aggregator.state().items()} == {"first/x": 0.5, "first/y": 1.0}


def test_the_second_moment_of_a_fedavgm_is_refused():
    with pytest.raises(ValueError, match="'second/x' is no moment of fedavgm"):
        make(server_optimiser="fedavgm").load({"second/x": torch.ones(1)})
