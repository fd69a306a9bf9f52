"""Changes go through a known function as its derivative says, in both directions."""

import pytest
import torch
import torch.nn.functional as F

from splitfed.privacy.leakage.jacobian import Linearisation


@pytest.fixture
def block():
    """Causal attention after a norm, with a residual: what a block does, in float64."""
    weights = torch.randn(3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4

    def forward(x_BTD):
        normed = F.rms_norm(x_BTD, (8,))
        q, k, v = (normed @ weight for weight in weights)
        return x_BTD + F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward


def draw(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_small_change_is_pushed_as_the_function_changes(block):
    x, change = draw(2, 5, 8, seed=1), draw(2, 5, 8, seed=2)
    step = 1e-6
    differences = (block(x + step * change) - block(x - step * change)) / (2 * step)
    assert torch.allclose(Linearisation(block, x).push(change), differences, atol=1e-8)


def test_pushing_and_pulling_are_each_others_transpose(block):
    x, change, gradient = draw(2, 5, 8, seed=1), draw(2, 5, 8, seed=2), draw(2, 5, 8, seed=3)
    near = Linearisation(block, x)
    assert torch.equal(near.value, block(x))
    there = (near.push(change) * gradient).sum()
    assert there.item() == pytest.approx((near.pull(gradient) * change).sum().item(), rel=1e-12)


def test_what_is_pulled_can_be_differentiated_by_what_was_given(block):
    x, gradient, weight = draw(1, 4, 8, seed=1), draw(1, 4, 8, seed=2).requires_grad_(), draw(1, 4, 8, seed=3)
    near = Linearisation(block, x)
    (near.pull(gradient, differentiable=True) * weight).sum().backward()
    assert torch.allclose(gradient.grad, near.push(weight))


def test_no_parameter_gets_a_gradient():
    layer = torch.nn.Linear(4, 3)
    near = Linearisation(layer, torch.randn(2, 4))
    near.push(torch.randn(2, 4))
    near.pull(torch.randn(2, 3))
    assert all(parameter.grad is None for parameter in layer.parameters())
