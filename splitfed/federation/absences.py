"""What happens in a round beside its updates: who goes, and how often it begins again."""

from dataclasses import dataclass, field


@dataclass
class Absences:
    """Of one round, to be told at its end.

    Attributes:
        silent: Members that it went on without because nothing was heard of them.
        left: Members that left while it was open, whether they came back or not.
        begun_again: How often it began again for all.
    """

    silent: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    begun_again: int = 0
