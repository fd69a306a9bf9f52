"""An adapter update names the records that it was made of, until noise hides them."""

import math

import pytest
import torch

from splitfed.privacy.leakage.membership import (
    alignment_scores,
    best_threshold,
    found_at,
    membership_result,
    stand_out,
)

P = 3000


def records(count, *, seed):
    """Gradients with a common direction, some that vary together, unequal scales, and something of their own."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    scale_P = torch.rand(P, generator=fixed) * 3 + 0.1
    common_P, shared_KP = torch.randn(P, generator=fixed), torch.randn(5, P, generator=fixed)
    return scale_P * (
        3 * common_P + 2 * torch.randn(count, 5, generator=generator) @ shared_KP
        + torch.randn(count, P, generator=generator)
    )  # fmt: skip


def round_of(members, *, noise=0.0, seed=0):
    """An update down the members' gradients, each parameter divided by its usual size as Adam does."""
    update = -(members / members.square().mean(0).sqrt()).sum(0)
    return update + noise * torch.randn(P, generator=torch.Generator().manual_seed(seed))


def play(*, noise=0.0, seed=0):
    members, others, public = (records(count, seed=seed + k) for k, count in enumerate((30, 30, 90)))
    update = round_of(members, noise=noise, seed=seed)
    return tuple(alignment_scores(gradients, update, public) for gradients in (members, others))


def test_members_score_higher_than_others():
    members, others = play()
    assert (members[:, None] > others).float().mean() > 0.95


def test_what_all_records_share_is_left_out_of_the_scores():
    members, others, public = records(30, seed=0), records(30, seed=1), records(90, seed=2)
    update = round_of(members)
    plain = [-(gradients @ update) / gradients.norm(dim=1) for gradients in (members, others)]
    scores = [alignment_scores(gradients, update, public) for gradients in (members, others)]
    area = [(one[:, None] > other).float().mean().item() for one, other in (plain, scores)]
    assert area[1] > area[0] + 0.2


def test_the_scale_of_an_update_does_not_matter():
    members, public = records(10, seed=0), records(30, seed=1)
    update = round_of(members)
    one, other = (alignment_scores(members, scale * update, public) for scale in (1.0, 1e-4))
    assert torch.allclose(one, other, atol=1e-5)


def test_noise_lowers_balanced_accuracy_down_to_chance():
    rates = []
    for noise in (0.0, 60.0, 1e6):
        shadow = play(noise=noise, seed=10)
        games = [play(noise=noise, seed=seed) for seed in (20, 30, 40, 50)]
        result = membership_result(
            "alignment", *zip(*games, strict=True), thresholds=[best_threshold(*shadow)] * len(games)
        )
        rates.append(result)
    assert rates[0].rate > 0.9
    assert rates[0].rate > rates[1].rate > rates[2].rate - 0.05
    low, high = rates[2].interval()
    assert low <= 0.5 <= high
    assert rates[2].chance == 0.5


def test_a_threshold_separates_what_can_be_separated():
    members, others = torch.tensor([0.4, 0.5, 0.9]), torch.tensor([0.1, 0.2])
    assert 0.2 < best_threshold(members, others) < 0.4
    assert best_threshold(torch.tensor([1.0]), torch.tensor([1.0])) in (0.0, 2.0)


def test_what_moves_all_records_that_are_judged_together_moves_none():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.9, 0.3])
    assert stand_out(scores).tolist() == pytest.approx([-0.2, 0.1, -0.1, 0.6, 0.0])
    assert torch.allclose(stand_out(scores + 5), stand_out(scores))


def test_right_answers_are_counted_on_both_sides():
    members = [torch.tensor([0.9, 0.1]), torch.tensor([0.8])]
    others = [torch.tensor([0.2, 0.6]), torch.tensor([0.8])]
    result = membership_result("alignment", members, others, [0.5, 0.8])
    assert (result.successes, result.trials) == (2 + 1, 6)
    assert result.target == "membership"


def test_uneven_sides_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        membership_result("alignment", [torch.zeros(2)], [torch.zeros(1)], [0.0])


@pytest.mark.parametrize(("false_alarms", "found"), [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
def test_few_sure_answers_are_counted_by_themselves(false_alarms, found):
    members, others = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.5, 1.5, 2.5])
    assert found_at(members, others, false_alarms=false_alarms) == found


def test_what_no_figure_can_be_taken_from_is_refused():
    with pytest.raises(ValueError, match="3 public records or more"):
        alignment_scores(torch.zeros(2, 5), torch.zeros(5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="same parameters"):
        alignment_scores(torch.zeros(2, 5), torch.zeros(4), torch.zeros(9, 5))
    with pytest.raises(ValueError, match="at least one of each"):
        best_threshold(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match="below 1"):
        found_at(torch.zeros(1), torch.zeros(1), false_alarms=1.0)


def test_an_update_of_nothing_names_nobody():
    scores = alignment_scores(records(4, seed=0), torch.zeros(P), records(20, seed=1))
    assert all(math.isfinite(score) for score in scores)
    assert scores.abs().max() == 0
