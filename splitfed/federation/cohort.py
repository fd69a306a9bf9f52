"""Who is asked to take part in a round: a ranking that is drawn anew for each, and that anyone can draw again."""

import hashlib
import json
from collections.abc import Iterable


def ranked(names: Iterable[str], *, seed: int, round: int) -> list[str]:
    """Put members in the order in which a round asks them.

    Args:
        names: Names of members, in any order.
        seed: The run's seed.
        round: The round, from 1.

    Guarantees:
        * The order is a function of the seed, the round and the names, the same on every machine.
        * It is that of each pair alone: who comes before whom does not hang on who else is there.
    """
    return sorted(names, key=lambda name: (_place(name, seed, round), name))


def _place(name: str, seed: int, round: int) -> bytes:
    return hashlib.sha256(json.dumps(["cohort", seed, round, name]).encode()).digest()
