"""Leakage: what attacks by a server that follows the protocol recover from what it is sent. Never call it privacy."""

from splitfed.privacy.leakage.estimate import AttackResult, Target

__all__ = ["AttackResult", "Target"]
