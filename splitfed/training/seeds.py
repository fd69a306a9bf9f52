"""Random streams as pure functions of what they are for, never of what ran before."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Derive the seed of one random stream from the facts that name it.

    Args:
        *parts: The run seed and whatever names the stream: round, client, step, purpose.

    Returns:
        A seed in [0, 2**63), the same on every machine.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
