"""What a server that follows the protocol sees of given examples, with noise off and with the run's protection.

Shapes: B sequences, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from splitfed.privacy import (
    Composition,
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Mechanism,
    MetricMechanism,
    NoMechanism,
    clip,
    format_epsilon,
)
from splitfed.privacy.leakage import Sending, gaussian_log_density, metric_log_density
from splitfed.study.audit_setting import AuditSetting, LabelledTexts
from splitfed.training.client_step import causal_lm_loss
from splitfed.training.data import Example
from splitfed.training.link import cross, link_codecs
from splitfed.training.protection import output_gradient_mechanism, smashed_mechanism

_SEQUENCES_AT_ONCE: Final = 8


@dataclass(frozen=True)
class Guarantee:
    """What one release is guaranteed, as a table says it.

    Attributes:
        epsilon: Epsilon of one release; None where none is guaranteed.
        unit: Who is protected; empty where nobody is.
        text: Both in words.
    """

    epsilon: float | None
    unit: str
    text: str


NOTHING: Final = Guarantee(None, "", "none")


@dataclass(frozen=True)
class Protection:
    """How smashed data and output gradients leave in this part of an audit.

    Attributes:
        is_on: Noise is on.
        smashed: What smashed data passes.
        output_gradient: What output gradients pass.
        delta: The delta at which epsilon is stated.
        relation: The neighbouring relation.
    """

    is_on: bool
    smashed: Mechanism
    output_gradient: Mechanism
    delta: float
    relation: str

    def guarantee(self, mechanism: Mechanism) -> Guarantee:
        """Say what one release through a mechanism is guaranteed."""
        if isinstance(mechanism, MetricMechanism):
            return Guarantee(None, mechanism.unit, f"{mechanism.eta:g} · distance")
        return gaussian_guarantee(mechanism.noise_multiplier, mechanism.unit, self.delta, self.relation)


def gaussian_guarantee(noise_multiplier: float, unit: str, delta: float, relation: str) -> Guarantee:
    """Say what one Gaussian release is guaranteed."""
    if noise_multiplier == 0:
        return NOTHING
    epsilon = Composition(signal=noise_multiplier**-2).epsilon(delta, relation)
    return Guarantee(epsilon, unit, format_epsilon(epsilon))


def protections(setting: AuditSetting) -> list[Protection]:
    """Give what the audit compares: nothing, and what the run asks for where that is more than nothing."""
    privacy = setting.privacy
    off = Protection(False, NoMechanism(), NoMechanism(), privacy.delta, privacy.relation)
    if not privacy.is_on:
        return [off]
    smashed, output_gradient = smashed_mechanism(privacy), output_gradient_mechanism(privacy)
    return [off, Protection(True, smashed, output_gradient, privacy.delta, privacy.relation)]


@dataclass(frozen=True)
class View:
    """What the server sees of some sequences, beside the truth that only the audit has.

    Attributes:
        texts: The truth.
        smashed_BTD: Smashed data as the server decodes it.
        hidden_BTD: The trunk output as the agent decodes it, which the server knows.
        gradient_BTD: Output gradient of each sequence's own loss ÷ T, as the server decodes it.
    """

    texts: LabelledTexts
    smashed_BTD: Tensor
    hidden_BTD: Tensor
    gradient_BTD: Tensor

    def first(self, sequences: int) -> "View":
        """Leave out all but the first sequences."""
        few = slice(sequences)
        texts = LabelledTexts(self.texts.input_ids_BT[few], self.texts.lengths_B[few], self.texts.targets_BT[few])
        return View(texts, self.smashed_BTD[few], self.hidden_BTD[few], self.gradient_BTD[few])


def view(
    setting: AuditSetting,
    protection: Protection,
    examples: Sequence[Example],
    *,
    on_progress: Callable[[float], None] = lambda part: None,
) -> View:
    """Run examples through the split model as a first local step would, and keep what the server sees.

    Every sequence is padded to the run's T, with noise off too, so that both are judged on the same rows.

    Args:
        setting: The run.
        protection: What smashed data and output gradients pass.
        examples: At least one.
        on_progress: Told the part that is done.
    """
    parts, codecs = setting.parts(), link_codecs(setting.config.codecs)
    texts = setting.texts(examples)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(examples), _SEQUENCES_AT_ONCE):
        few = slice(start, start + _SEQUENCES_AT_ONCE)
        with torch.no_grad():
            smashed_BTD = protection.smashed.release(parts.bottom(texts.input_ids_BT[few]))
            smashed_BTD, _ = cross(smashed_BTD, codecs.smashed)
            hidden_BTD, _ = cross(parts.trunk(smashed_BTD), codecs.trunk_output)
        hidden_BTD.requires_grad_()
        logits_BTV = parts.top(hidden_BTD).logits
        labels_BT = texts.targets_BT[few].roll(1, dims=1)  # as the library has them: not shifted
        (gradient_BTD,) = torch.autograd.grad(
            causal_lm_loss(logits_BTV, labels_BT, float(setting.max_tokens)), hidden_BTD
        )
        gradient_BTD, _ = cross(protection.output_gradient.release(gradient_BTD), codecs.output_gradient)
        seen.append((smashed_BTD, hidden_BTD.detach(), gradient_BTD))
        on_progress(min(1.0, few.stop / len(examples)))
    smashed, hidden, gradients = (torch.cat(pieces) for pieces in zip(*seen, strict=True))
    return View(texts, smashed, hidden, gradients)


def without_noise(mechanism: Mechanism) -> Callable[[Tensor], Tensor]:
    """Give a mechanism's clip alone."""
    if isinstance(mechanism, GaussianSequenceMechanism | GaussianTokenMechanism):
        return lambda x_BTD: clip(x_BTD, mechanism.clipping_norm, per=mechanism.per)
    return lambda x_BTD: x_BTD


def log_density(mechanism: Mechanism, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """Give the log density of a mechanism's noise by the length of a row; None without noise."""
    if isinstance(mechanism, GaussianSequenceMechanism | GaussianTokenMechanism):
        return gaussian_log_density(mechanism.noise_std(tokens))
    return metric_log_density(mechanism.eta) if isinstance(mechanism, MetricMechanism) else None


def sending(mechanism: Mechanism, tokens: int) -> Sending:
    """Say what the server knows of how output gradients are made."""
    if isinstance(mechanism, GaussianSequenceMechanism | GaussianTokenMechanism):
        return Sending(1 / tokens, mechanism.clipping_norm, mechanism.per, mechanism.noise_std(tokens))
    return Sending(1 / tokens)
