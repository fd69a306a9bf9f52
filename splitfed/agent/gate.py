"""The gate of this device, from its owner's policy: what is clipped, noised and charged before it leaves."""

import math

import torch

from splitfed.config import PrivacySection
from splitfed.errors import WeightsError
from splitfed.models import Bottom
from splitfed.privacy import GaussianSequenceMechanism, Ledger, Mechanism, NoMechanism
from splitfed.training.releases import LedgeredReleases, Releases

_SEQUENCES, _TOKENS = 8, 32


def settle(privacy: PrivacySection, bottom: Bottom) -> PrivacySection:
    """Fill in what the owner left to the model: the clip of smashed data, from the bottom's output on random tokens.

    The device's text has no part in it, so it costs no privacy; and whatever the bottom is, noise grows with the clip.

    Args:
        privacy: The owner's policy.
        bottom: The bottom at the run's start.

    Returns:
        The policy with every figure in it.

    Raises:
        WeightsError: If the bottom's output is not finite, or zero.
    """
    if privacy.clipping_norm_smashed is not None:
        return privacy
    draw = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(bottom.config.vocab_size, (_SEQUENCES, _TOKENS), generator=draw)
    with torch.no_grad():
        norm = bottom(tokens_BT).float().norm(dim=-1).median().item()
    if not 0 < norm < math.inf:
        raise WeightsError(f"The base model's bottom gives vectors of norm {norm}; fetch the base model again.")
    return privacy.model_copy(update={"clipping_norm_smashed": float(f"{norm:.3g}")})


def open_gate(privacy: PrivacySection, ledger: Ledger, run_id: str) -> Releases:
    """Build the gate that smashed data and output gradients pass.

    Args:
        privacy: The owner's policy, settled.
        ledger: Where releases are charged.
        run_id: The run, for the ledger.
    """
    assert privacy.clipping_norm_smashed is not None
    return LedgeredReleases(
        smashed_mechanism=_mechanism(privacy.clipping_norm_smashed, privacy.noise_multiplier),
        output_gradient_mechanism=_mechanism(privacy.clipping_norm_output_gradient, privacy.noise_multiplier),
        ledger=ledger,
        run=run_id,
    )


def _mechanism(clipping_norm: float, noise_multiplier: float) -> Mechanism:
    return GaussianSequenceMechanism(clipping_norm, noise_multiplier) if noise_multiplier > 0 else NoMechanism()
