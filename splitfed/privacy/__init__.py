"""Local differential privacy: mechanisms (clip and noise), accounting, and the ledger of what was spent."""

from splitfed.privacy.accounting import (
    Composition,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_signal,
    poisson_overflow,
)
from splitfed.privacy.calibration import noise_multiplier_for, sampled_noise_multiplier_for
from splitfed.privacy.clip import clip
from splitfed.privacy.figures import format_epsilon
from splitfed.privacy.ledger import Ledger
from splitfed.privacy.ledger_file import read_ledger
from splitfed.privacy.ledger_report import LedgerReport, report_ledger
from splitfed.privacy.mechanisms import (
    RELATION,
    UNIT,
    GaussianSequenceMechanism,
    GaussianTokenMechanism,
    Mechanism,
    NoMechanism,
    Unit,
)
from splitfed.privacy.metric import MetricMechanism
from splitfed.privacy.noise import NoiseStream
from splitfed.privacy.per_example import PerExampleMechanism
from splitfed.privacy.reply import bounded_reply
from splitfed.privacy.salt import record_hash
from splitfed.privacy.sampling import StepSampling
from splitfed.privacy.spending import CHANNELS, Channel, Charge
from splitfed.privacy.update import UpdateMechanism
from splitfed.privacy.witness import witness_folder

__all__ = [
    "CHANNELS",
    "RELATION",
    "UNIT",
    "Channel",
    "Charge",
    "Composition",
    "GaussianSequenceMechanism",
    "GaussianTokenMechanism",
    "Ledger",
    "LedgerReport",
    "Mechanism",
    "MetricMechanism",
    "NoMechanism",
    "NoiseStream",
    "PerExampleMechanism",
    "StepSampling",
    "Unit",
    "UpdateMechanism",
    "bounded_reply",
    "clip",
    "epsilon",
    "format_epsilon",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_signal",
    "noise_multiplier_for",
    "poisson_overflow",
    "read_ledger",
    "record_hash",
    "report_ledger",
    "sampled_noise_multiplier_for",
    "witness_folder",
]
