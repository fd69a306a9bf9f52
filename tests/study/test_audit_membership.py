"""Games with known members: an update names them, strong noise on every step does not."""

import pytest
import torch

from splitfed.study.audit_membership import MembershipGames, count_members, update_guarantee, why_no_membership
from tests.study.audited_run import setting_of


def test_an_update_names_its_members_until_noise_hides_them(tmp_path):
    setting = setting_of(
        tmp_path, private=32, public=60, examples=8, privacy="noise_multiplier = 20.0", local_steps=4, batch_size=8
    )
    heard = []
    games = MembershipGames(setting, on_progress=heard.append)
    assert heard[-1] == 1.0
    assert games.members == 16
    off, on = (games.play(is_protected=is_protected, on_progress=heard.append) for is_protected in (False, True))
    assert [outcome.result.attack for outcome in off] == ["gradient alignment", "loss difference"]
    assert all(outcome.result.trials == 4 * 16 for outcome in (*off, *on))
    assert off[0].result.rate > 0.8
    assert off[0].result.rate > on[0].result.rate + 0.1
    assert off[0].found > 0.3


def test_gradients_are_taken_one_record_at_a_time(tmp_path):
    setting = setting_of(tmp_path, public=30)
    games = MembershipGames(setting, on_progress=lambda part: None)
    together, losses = games._measure(setting.private, lambda part: None)
    alone = [games._measure([example], lambda part: None) for example in setting.private]
    assert torch.allclose(together, torch.cat([gradients for gradients, _ in alone]), atol=1e-5)
    assert torch.allclose(losses, torch.cat([loss for _, loss in alone]), atol=1e-5)


@pytest.mark.parametrize(
    ("privacy", "unit"), [("", "sequence"), ('adapter = "update"', "client"), ('adapter = "none"', "")]
)
def test_an_update_is_stated_with_what_protects_it(tmp_path, privacy, unit):
    setting = setting_of(tmp_path, privacy=f"noise_multiplier = 2.0\n{privacy}")
    guarantee = update_guarantee(setting, is_protected=True)
    assert guarantee.unit == unit
    assert (guarantee.epsilon is None) == (unit == "")
    assert update_guarantee(setting, is_protected=False).text == "none"


def test_where_there_can_be_no_game_the_reason_is_said(tmp_path):
    assert why_no_membership(setting_of(tmp_path)) is None
    assert "nothing to train" in why_no_membership(setting_of(tmp_path, bottom_blocks=0, top_blocks=0))
    few = setting_of(tmp_path, public=10)
    assert count_members(few) == 3
    assert "8 private records and 12 public sequences, and there are 16 and 10" in why_no_membership(few)
