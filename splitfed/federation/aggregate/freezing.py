"""Which LoRA factors are trained in a round: with one of the two frozen, the mean of the products is exact.

Source: FFA-LoRA, Sun, Li, Li & Ding 2024, Improving LoRA in privacy-preserving federated learning: A stays as it was
initialised. Alternating freeze as in LoRA-A2, Koo et al. 2024, Towards robust and efficient federated low-rank
adaptation with heterogeneous clients, without its choice of ranks. B comes first: it starts at zero, and with B = 0 the
gradient of A is zero.
"""

from splitfed.config.aggregation import LoraRule

BOTH = frozenset({"A", "B"})


def trained_factors(rule: LoraRule, round: int) -> frozenset[str]:
    """Say which factors of every layer are trained in a round.

    Args:
        rule: What is averaged.
        round: The round, from 1.

    Returns:
        Some of ``"A"``, shape [R, I], and ``"B"``, shape [O, R].

    Guarantees:
        * With "ffa" and "alternating" it is one factor, and the mean of the products B A is the product of the means.
    """
    if rule == "ffa":
        return frozenset({"B"})
    if rule == "alternating":
        return frozenset({"B"} if round % 2 else {"A"})
    return BOTH
