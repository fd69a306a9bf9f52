"""Local differential privacy: mechanisms (clip and noise), accounting, and the ledger of what was spent."""

from splitfed.privacy.accounting import epsilon
from splitfed.privacy.clip import clip
from splitfed.privacy.ledger import Ledger
from splitfed.privacy.ledger_file import read_ledger
from splitfed.privacy.ledger_report import LedgerReport, format_epsilon, report_ledger
from splitfed.privacy.mechanisms import RELATION, UNIT, GaussianSequenceMechanism, Mechanism, NoMechanism
from splitfed.privacy.noise import NoiseStream
from splitfed.privacy.salt import record_hash
from splitfed.privacy.spending import CHANNELS, Channel, Charge

__all__ = [
    "CHANNELS",
    "RELATION",
    "UNIT",
    "Channel",
    "Charge",
    "GaussianSequenceMechanism",
    "Ledger",
    "LedgerReport",
    "Mechanism",
    "NoMechanism",
    "NoiseStream",
    "clip",
    "epsilon",
    "format_epsilon",
    "read_ledger",
    "record_hash",
    "report_ledger",
]
