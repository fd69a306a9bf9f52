"""The errors a user of splitfed can meet, as one tree.

SplitFedError
 ├ ConfigError               a configuration file or a command line that cannot be used
 ├ DataError                 a data file that is missing, empty or wrongly shaped
 ├ UnsupportedFamily         a model family that no test has proven
 ├ SplitPointError           a split point outside the model (also a ValueError)
 ├ FingerprintMismatch       agent and server hold different base models
 ├ WeightsError              a checkpoint that is missing, damaged or does not fit its configuration
 ├ PrivacyError
 │  ├ BudgetExhausted        the next release would pass the agent's epsilon budget
 │  └ LedgerError            a ledger that cannot be read or written
 ├ NonFiniteLoss             the loss became NaN or infinite
 ├ RunDirectoryError         the directory already holds another run
 ├ StateError                an agent's state cannot be written
 ├ OutputError               what a command prints cannot be written
 └ LinkError
    ├ AddressInUse           another process listens on the daemon's address
    ├ ServerUnreachable      no server answered, after all retries
    ├ RoundLost              the round ended without this agent
    ├ ProtocolError          the other side sent what the protocol does not allow
    └ JoinRefused            the server, or the agent's own policy, refused to join the run

Each message is one sentence that says what is wrong, with the value, and what to do about it.
"""

from typing import ClassVar


class SplitFedError(Exception):
    """What can go wrong in service, as opposed to a mistake in a caller's argument (``ValueError``)."""

    exit_code: ClassVar[int] = 1
    """Exit status of a command that ends with this error."""


class ConfigError(SplitFedError):
    """A configuration file or a command line that cannot be used."""

    exit_code = 2


class DataError(SplitFedError):
    """A data file that is missing, empty or wrongly shaped."""


class UnsupportedFamily(SplitFedError):
    """A model family that no test has proven to split without changing its numbers."""


class SplitPointError(SplitFedError, ValueError):
    """A split point outside the model."""

    exit_code = 2


class FingerprintMismatch(SplitFedError):
    """Agent and server hold different base models."""


class WeightsError(SplitFedError):
    """A checkpoint that is missing, damaged or does not fit its configuration."""


class PrivacyError(SplitFedError):
    """A release that the agent's own privacy policy does not allow, or that is not finite."""

    exit_code = 3


class BudgetExhausted(PrivacyError):
    """The next release would pass the agent's epsilon budget, so it was not made."""


class LedgerError(PrivacyError):
    """A ledger that cannot be read or written; nothing is released without one."""

    exit_code = 1


class NonFiniteLoss(SplitFedError):
    """The loss became NaN or infinite; its output gradient was not sent."""

    exit_code = 3


class RunDirectoryError(SplitFedError):
    """The directory already holds another run."""


class StateError(SplitFedError):
    """An agent's state cannot be written."""


class OutputError(SplitFedError):
    """What a command prints cannot be written."""


class LinkError(SplitFedError):
    """The connection between agent and server, or what came over it, failed."""


class AddressInUse(LinkError):
    """Another process listens on the daemon's address."""


class ServerUnreachable(LinkError):
    """No server answered, after all retries."""


class RoundLost(LinkError):
    """The round ended without this agent, which has to take its state from the next one."""


class ProtocolError(LinkError):
    """The other side sent what the protocol does not allow."""


class JoinRefused(LinkError):
    """The server, or the agent's own policy, refused to join the run; to ask again changes nothing."""

    exit_code = 3
