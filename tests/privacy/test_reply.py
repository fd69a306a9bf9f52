"""No answer that is finite makes a device refuse one text and not another."""

import math

import pytest
import torch

from splitfed.models import partition
from splitfed.privacy import bounded_reply
from splitfed.training.client_step import causal_lm_loss
from tests.equivalence.tiny_models import tiny_model

LARGEST = 1e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reply_of_a_usual_size_is_given_back_to_the_bit(dtype: torch.dtype) -> None:
    reply_BTD = (torch.randn(3, 5, 8) * 1e4).to(dtype)
    assert bounded_reply(reply_BTD).dtype is dtype
    assert torch.equal(bounded_reply(reply_BTD), reply_BTD)
    at_the_bound = torch.zeros(1, 2, 2)
    at_the_bound[0, 0, 0] = LARGEST
    assert torch.equal(bounded_reply(at_the_bound), at_the_bound)


@pytest.mark.parametrize("size", [1e10, 2.74e35, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_larger_one_keeps_its_direction_and_moves_no_other_sequence(size: float, dtype: torch.dtype) -> None:
    reply_BTD = torch.linspace(-1, 1, 2 * 4 * 16).view(2, 4, 16)
    reply_BTD[1] *= size
    bounded_BTD = bounded_reply(reply_BTD.to(dtype))
    rounding = torch.finfo(dtype).eps
    assert torch.equal(bounded_BTD[0], reply_BTD[0].to(dtype))
    large, found = reply_BTD[1].to(dtype).double(), bounded_BTD[1].double()
    assert found.norm().item() == pytest.approx(LARGEST, rel=rounding)
    assert torch.allclose(found, large * (LARGEST / large.norm()), rtol=2 * rounding, atol=0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    reply_BTD = torch.ones(2, 3, 4)
    reply_BTD[1, 0, 0] = value
    bounded_BTD = bounded_reply(reply_BTD)
    assert torch.isfinite(bounded_BTD[0]).all()
    assert bounded_BTD[1].isnan().any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("top_blocks", [0, 1])
@pytest.mark.parametrize("size", [1e18, 1e30, 1e37, 3e38])
def test_no_trunk_output_tells_by_an_overflow_which_rows_carry_loss(family: str, top_blocks: int, size: float) -> None:
    top = partition(tiny_model(family), bottom_blocks=1, top_blocks=top_blocks).top
    output_BTD = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    output_BTD[0, 3] = size * output_BTD[0, 3].sign()
    for labelled in ([1, 2], [1, 2, 4], [7]):
        labels_BT = torch.full((1, 8), -100)
        labels_BT[0, labelled] = 5
        taken_BTD = bounded_reply(output_BTD).requires_grad_()
        loss = causal_lm_loss(top(taken_BTD).logits, labels_BT, 8.0)
        (gradient_BTD,) = torch.autograd.grad(loss, taken_BTD)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient_BTD).all()
