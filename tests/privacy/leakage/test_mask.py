"""Rows without loss show where a prompt ends, until noise hides them."""

import pytest
import torch

from splitfed.privacy.leakage.mask import MaskAttack
from tests.privacy.leakage.label_leaks import RealModel, e2e_rows

T = 40


def masks(count, *, seed):
    """A prompt of 5 to 19 rows, then 8 to 19 rows with loss, then padding."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(5, 20, (count, 1), generator=generator)
    end = start + torch.randint(8, 20, (count, 1), generator=generator)
    at = torch.arange(T)
    return (at >= start) & (at < end)


def norms(mask, std, *, D=16, seed=0):
    """Norms of rows that point anywhere with length 1 where there is loss, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*mask.shape, D, generator=generator)
    rows = rows / rows.norm(dim=-1, keepdim=True) * mask.unsqueeze(-1)
    return (rows + std * torch.randn(rows.shape, generator=generator)).norm(dim=-1)


def attack(std):
    public, private = masks(200, seed=1), masks(100, seed=2)
    attack = MaskAttack(norms(public, std, seed=3), public)
    return attack.result("norms", attack.probability(norms(private, std, seed=4)), private)


def test_exact_zeros_give_the_mask_away():
    result = attack(0.0)
    assert (result.rate, result.trials) == (1.0, 100 * T)
    assert result.target == "mask"


def test_rows_speak_for_each_other_where_one_alone_is_lost_in_noise():
    std = 0.35
    public, private = masks(200, seed=1), masks(100, seed=2)
    seen = norms(private, std, seed=4)
    threshold = norms(public, std, seed=3)[public].quantile(0.5)
    alone = ((seen > threshold) == private).float().mean().item()
    assert attack(std).rate > alone + 0.1


def test_noise_lowers_the_share_down_to_chance():
    rates = [attack(std).rate for std in (0.1, 0.5, 1.0)]
    assert rates == sorted(rates, reverse=True)
    drowned = attack(50.0)
    low, high = drowned.interval()
    assert low <= drowned.chance <= high
    assert attack(0.35).beats_chance()


def test_without_looking_each_place_is_as_public_masks_have_it():
    public = masks(2000, seed=1)
    tested = MaskAttack(norms(public, 0.0), public)
    blind = tested.probability(None, sequences=2)
    assert torch.equal(blind[0], blind[1])
    assert torch.allclose(blind[0], public.float().mean(0), atol=0.03)


def test_chance_is_the_better_of_two_blind_guesses():
    public = masks(500, seed=1)
    tested = MaskAttack(norms(public, 0.0), public)
    likely = tested.probability(None)[0] > 0.5
    private = masks(200, seed=2)
    by_place = (likely == private).float().mean().item()
    assert tested.result("x", private.float(), private).chance == pytest.approx(by_place)
    odd_one_out = torch.zeros(50, T, dtype=torch.bool)
    assert tested.result("x", odd_one_out.float(), odd_one_out).chance == 1.0


@pytest.mark.parametrize(
    ("statistic", "mask", "said"),
    [
        (torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool), "do not belong"),
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), "nothing to tell apart"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), "nothing to tell apart"),
    ],
)
def test_what_it_cannot_learn_from_is_refused(statistic, mask, said):
    with pytest.raises(ValueError, match=said):
        MaskAttack(statistic, mask)


@pytest.mark.parametrize(("top_blocks", "least"), [(0, 1.0), (1, 0.95)])
def test_real_text_shows_where_its_prompt_ends(stories260k, e2e, top_blocks, least):
    model = RealModel(stories260k)
    public, private = (
        model.see(e2e_rows(e2e, count, skip=skip), top_blocks=top_blocks) for count, skip in ((48, 16), (16, 0))
    )
    tested = MaskAttack(public.gradient_BTD.norm(dim=-1), public.labels_BT != -100)
    result = tested.result("norms", tested.probability(private.gradient_BTD.norm(dim=-1)), private.labels_BT != -100)
    assert result.rate >= least
    assert result.rate > result.chance + 0.05
