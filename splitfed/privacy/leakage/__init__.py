"""Leakage: what attacks by a server that follows the protocol recover from what it is sent. Never call it privacy."""

from splitfed.privacy.leakage.estimate import AttackResult, Target
from splitfed.privacy.leakage.tokens import Embedding, attack_tokens
from splitfed.privacy.leakage.tokens_inverter import Progress
from splitfed.privacy.leakage.tokens_knowledge import Texts, TokenKnowledge, gaussian_log_density, metric_log_density

__all__ = [
    "AttackResult",
    "Embedding",
    "Progress",
    "Target",
    "Texts",
    "TokenKnowledge",
    "attack_tokens",
    "gaussian_log_density",
    "metric_log_density",
]
