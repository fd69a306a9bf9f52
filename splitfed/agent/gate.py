"""The gate of this device, from its owner's policy: what is clipped, noised and charged before it leaves."""

from splitfed.config import PrivacySection
from splitfed.privacy import GaussianSequenceMechanism, Ledger, Mechanism, NoMechanism
from splitfed.training.releases import LedgeredReleases, Releases


def open_gate(privacy: PrivacySection, ledger: Ledger, run_id: str) -> Releases:
    """Build the gate that smashed data and output gradients pass.

    Args:
        privacy: The owner's policy.
        ledger: Where releases are charged.
        run_id: The run, for the ledger.
    """
    return LedgeredReleases(
        smashed_mechanism=_mechanism(privacy.clipping_norm_smashed, privacy.noise_multiplier),
        output_gradient_mechanism=_mechanism(privacy.clipping_norm_output_gradient, privacy.noise_multiplier),
        ledger=ledger,
        run=run_id,
    )


def _mechanism(clipping_norm: float, noise_multiplier: float) -> Mechanism:
    return GaussianSequenceMechanism(clipping_norm, noise_multiplier) if noise_multiplier > 0 else NoMechanism()
