"""Who calls, and whether it means this run."""

import re
from typing import Any

from splitfed.config.section import NAME
from splitfed.errors import JoinRefused, ProtocolError

_NAME = re.compile(NAME)


class Identity:
    """Who calls: under mutual TLS a name is its certificate's, otherwise what the caller says.

    Args:
        run_id: The run of this server.
        is_secure: Calls come over mutual TLS.
    """

    def __init__(self, run_id: str, *, is_secure: bool) -> None:
        self._run_id = run_id
        self.is_secure = is_secure

    def check(self, context: Any, client: str, run_id: str | None = None) -> None:
        """Check the name of a caller, and that it means this run.

        Raises:
            JoinRefused: If the name is not the certificate's.
            ProtocolError: If it is not a name, or the run is another one.
        """
        if not _NAME.fullmatch(client):
            raise ProtocolError(
                f"{client[:64]!r} cannot be an agent's name; use 1 to 64 letters, digits, dots, dashes or underscores, "
                "and no dot at the beginning."
            )
        if run_id is not None and run_id != self._run_id:
            raise ProtocolError(f"This server serves the run {self._run_id!r}, not {run_id[:64]!r}.")
        if self.is_secure:
            names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", [])]
            if client not in names:
                raise JoinRefused(
                    f"The certificate is for {names[0] if names else 'nobody'!r}, not for {client!r}; use the agent's "
                    "own."
                )
