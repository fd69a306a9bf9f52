"""The audit sees what a server sees in a first local step: the same tensors, through the same code."""

import pytest
import torch

from splitfed.models import add_adapter
from splitfed.privacy import GaussianSequenceMechanism, GaussianTokenMechanism, MetricMechanism, NoMechanism
from splitfed.study.audit_view import log_density, protections, sending, view, without_noise
from splitfed.training.client_step import ClientTrainer
from splitfed.training.link import InProcessLink, link_codecs
from splitfed.training.releases import OpenReleases
from splitfed.training.setup import lora_settings
from splitfed.training.together import OwnCalls, at_once
from splitfed.training.trunk_step import TrunkTrainer
from tests.study.audited_run import setting_of


class Tapped:
    """A link that keeps what crosses it."""

    def __init__(self, link):
        self._link = link
        self.seen, self.traffic = {}, link.traffic

    def forward(self, place, smashed_BTD, **options):
        self.seen["smashed"] = smashed_BTD
        return self._link.forward(place, smashed_BTD, **options)

    def backward(self, place, output_gradient_BTD):
        self.seen["gradient"] = output_gradient_BTD
        return self._link.backward(place, output_gradient_BTD)

    def step(self, step, **options):
        return self._link.step(step, **options)


@pytest.mark.parametrize(("bottom_blocks", "top_blocks"), [(0, 0), (1, 2)])
def test_what_is_seen_is_what_a_client_sends(tmp_path, bottom_blocks, top_blocks):
    setting = setting_of(tmp_path, bottom_blocks=bottom_blocks, top_blocks=top_blocks, batch_size=4)
    config, parts = setting.config, setting.parts()
    for segment in parts:
        add_adapter(segment, lora_settings(config.lora), seed=0)
    trunk = TrunkTrainer(parts.trunk, config.training, seed=0)
    from splitfed.models import adapter_state

    trunk.open_round("a", 1, adapter_state(parts.trunk), {})
    link = Tapped(InProcessLink(OwnCalls(at_once(trunk)), "a", link_codecs(config.codecs)))
    client = ClientTrainer(
        parts.bottom, parts.top, config.training, OpenReleases(), client="a", seed=0, pad_token_id=setting.pad_token_id
    )
    client.step(link, setting.private, round=1, step=0)

    off = protections(setting)[0]
    seen = view(setting, off, setting.private)
    rows = link.seen["smashed"].shape[1]
    close = {"rtol": 0.02, "atol": seen.smashed_BTD.abs().max().item() / 100}  # the codec's steps
    assert torch.allclose(seen.smashed_BTD[:, :rows], link.seen["smashed"], **close)
    label_tokens = seen.texts.carries_loss.sum()
    expected = link.seen["gradient"] * label_tokens / setting.max_tokens
    close["atol"] = expected.abs().max().item() / 50
    assert torch.allclose(seen.gradient_BTD[:, :rows], expected, **close)


def test_noise_is_compared_with_none(tmp_path):
    off, on = protections(setting_of(tmp_path, privacy="noise_multiplier = 3.0"))
    assert (off.is_on, on.is_on) == (False, True)
    assert isinstance(off.smashed, NoMechanism)
    assert (on.smashed.noise_multiplier, on.output_gradient.noise_multiplier) == (3.0, 3.0)
    assert len(protections(setting_of(tmp_path, privacy="noise_multiplier = 0.0"))) == 1


def test_noise_reaches_what_is_seen_of_padding_too(tmp_path):
    setting = setting_of(tmp_path, privacy="noise_multiplier = 3.0")
    off, on = (view(setting, protection, setting.private) for protection in protections(setting))
    padding = torch.arange(setting.max_tokens) >= off.texts.lengths_B[:, None]
    assert padding.any()
    assert off.gradient_BTD[padding].abs().max() == 0
    assert (on.gradient_BTD[padding].norm(dim=-1) > 0).all()


def test_a_release_is_stated_with_its_own_unit(tmp_path):
    from splitfed.privacy import epsilon

    off, on = protections(setting_of(tmp_path, privacy="noise_multiplier = 3.0"))
    stated = on.guarantee(GaussianTokenMechanism(1.0, 2.0))
    assert stated.epsilon == epsilon([(2.0, 1)], 1e-5)
    assert stated.unit == "token"
    assert (off.guarantee(off.smashed).epsilon, off.guarantee(off.smashed).text) == (None, "none")
    metric = on.guarantee(MetricMechanism(5.0))
    assert (metric.epsilon, metric.unit, metric.text) == (None, "token", "5 · distance")


def test_what_an_attack_is_told_of_the_noise_is_what_the_mechanism_does():
    x = torch.randn(2, 6, 4)
    mechanism = GaussianSequenceMechanism(0.5, 2.0)
    assert (without_noise(mechanism)(x).norm(dim=-1) <= 0.5).all()
    assert torch.equal(without_noise(NoMechanism())(x), x)
    told = sending(mechanism, 6)
    assert (told.scale, told.clipping_norm, told.per) == (1 / 6, 0.5, "token")
    noise = torch.cat([mechanism.release(torch.zeros(50, 6, 4)).flatten() for _ in range(10)])
    assert told.noise_std == pytest.approx(noise.std().item(), rel=0.05)
    assert log_density(NoMechanism(), 6) is None
    near, far = log_density(MetricMechanism(5.0), 6)(torch.tensor([0.1, 0.5]))
    assert (near - far).item() == pytest.approx(5.0 * 0.4)
