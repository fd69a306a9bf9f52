"""How the clients of a round share the trunk's adapter: one policy object for each variant."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Variant:
    """What a variant decides, for a simulation and for a server alike.

    Attributes:
        name: As the run file has it.
        shares_adapter: The clients train one trunk adapter between them while the round lasts; otherwise each has its
            own copy.
        takes_turns: A client begins once the one before it has ended, with the trunk adapter that it left.
        steps_jointly: A local step is one step of the whole cohort: one forward, one backward, one update.
        is_deterministic: The same seed gives the same bits, whatever arrives first.
    """

    name: str
    shares_adapter: bool = False
    takes_turns: bool = False
    steps_jointly: bool = False
    is_deterministic: bool = True

    @property
    def averages_trunk(self) -> bool:
        """The clients' copies of the trunk adapter are averaged at the round's end."""
        return not self.shares_adapter and not self.takes_turns


SFLV1: Final = Variant("sflv1")
"""A copy for each client and round, averaged by examples (Thapa et al., SplitFed, 2022, algorithm 1)."""
SFLV2: Final = Variant("sflv2", takes_turns=True)
"""One adapter that goes from client to client, in an order drawn for each round (the same, SFLV2)."""
PARALLEL: Final = Variant("parallel", shares_adapter=True, steps_jointly=True)
"""One adapter, each local step one joint step over the cohort (Lin et al., SplitLoRA, 2024, section III)."""
ASYNC: Final = Variant("async", shares_adapter=True, is_deterministic=False)
"""One adapter, updated whenever a client's step is through, by less the staler it is (Xie et al., FedAsync, 2019)."""

_VARIANTS: Final = {variant.name: variant for variant in (SFLV1, SFLV2, PARALLEL, ASYNC)}


def variant_of(name: str) -> Variant:
    """Look a variant up by the name that the run file has for it.

    Raises:
        ValueError: If there is none.
    """
    if name not in _VARIANTS:
        raise ValueError(f"There is no variant {name!r}; choose among {', '.join(_VARIANTS)}.")
    return _VARIANTS[name]


@dataclass(frozen=True)
class Staleness:
    """How old a forward may be when its step is applied, and what it then counts for.

    The age of a step is the number of other steps applied to the shared adapter between its first forward and it.

    Args:
        most: Largest age; clients - 1 or more, for as many may be at work when one of them steps.
        clients: Clients that may be at work at the same time.
        exponent: A step of age s is applied at (1 + s) ** -exponent of the learning rate.

    Raises:
        ValueError: If ``most`` cannot be kept.

    Source: Xie, Koyejo & Gupta, Asynchronous federated optimization (2019), section 5.2, the polynomial weight.
    """

    most: int
    clients: int
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if self.most < self.clients - 1:
            raise ValueError(
                f"max_staleness is {self.most}, but {self.clients} clients at work make up to {self.clients - 1} steps "
                "in between; raise it."
            )

    def rate(self, age: int) -> float:
        """Give what the learning rate of a step of this age is multiplied by."""
        return float((1 + age) ** -self.exponent)

    def allows(self, age_of_oldest_other: int, own_age: int) -> bool:
        """Say whether a client may step now, given how old that makes the oldest step of another on its way.

        The oldest of all may always step: so nobody waits for ever, and no age exceeds ``most``.

        Args:
            age_of_oldest_other: Age that the oldest other step would have after this one; 0 if there is none.
            own_age: Age of this step.
        """
        return age_of_oldest_other <= self.most - (self.clients - 1) or own_age >= age_of_oldest_other - 1
