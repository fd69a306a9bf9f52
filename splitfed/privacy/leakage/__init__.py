"""Leakage: what attacks by a server that follows the protocol recover from what it is sent. Never call it privacy."""

from splitfed.privacy.leakage.estimate import AttackResult, Target
from splitfed.privacy.leakage.label_matching import match_labels
from splitfed.privacy.leakage.label_probe import LabelProbe
from splitfed.privacy.leakage.labels import LabelGuess, Sending, label_result, log_frequencies, recover_labels
from splitfed.privacy.leakage.mask import MaskAttack
from splitfed.privacy.leakage.membership import (
    alignment_scores,
    best_threshold,
    found_at,
    membership_result,
    stand_out,
)
from splitfed.privacy.leakage.tokens import Embedding, attack_tokens
from splitfed.privacy.leakage.tokens_inverter import Progress
from splitfed.privacy.leakage.tokens_knowledge import Texts, TokenKnowledge, gaussian_log_density, metric_log_density

__all__ = [
    "AttackResult",
    "Embedding",
    "LabelGuess",
    "LabelProbe",
    "MaskAttack",
    "Progress",
    "Sending",
    "Target",
    "Texts",
    "TokenKnowledge",
    "alignment_scores",
    "attack_tokens",
    "best_threshold",
    "found_at",
    "gaussian_log_density",
    "label_result",
    "log_frequencies",
    "match_labels",
    "membership_result",
    "metric_log_density",
    "recover_labels",
    "stand_out",
]
