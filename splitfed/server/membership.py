"""Who is a member of a run: which agent each name belongs to, and whom the run does not take in."""

from collections.abc import Mapping

from splitfed.errors import JoinRefused, RoundLost
from splitfed.federation import Rounds


class Membership:
    """The agents behind the names of a run's members.

    Args:
        run_id: Id of the run, for what is said to agents.
        rounds: Knows how many the run has room for, and who left it for good.
        agent_ids: Which agent each name belongs to already, hexadecimal.
    """

    def __init__(self, run_id: str, rounds: Rounds, agent_ids: Mapping[str, str]) -> None:
        self._run_id = run_id
        self._rounds = rounds
        self._agent_ids = dict(agent_ids)

    @property
    def agent_ids(self) -> dict[str, str]:
        """Which agent each name belongs to, hexadecimal."""
        return dict(self._agent_ids)

    def admit(self, client: str, agent_id: bytes, *, is_proven: bool = False) -> None:
        """Let an agent have a name from now on.

        Args:
            client: The name.
            agent_id: The agent's own id.
            is_proven: The name is its certificate's: a device that lost its id is then known all the same.

        Raises:
            JoinRefused: If the name belongs to another agent, the run is full, or this agent left it for good.
        """
        known = self._agent_ids.get(client)
        if known is not None and known != agent_id.hex() and not is_proven:
            raise JoinRefused(
                f"Another agent is called {client!r} in this run; choose another [agent] name, or give this one back "
                "the file agent-id of its state directory."
            )
        if not self._rounds.can_join(client):
            raise JoinRefused(
                f"The run {self._run_id!r} has all its agents already ({', '.join(self._rounds.members)}); "
                f"raise [federation] population to let {client!r} in."
            )
        if self._rounds.has_left_for_good(client):
            raise JoinRefused(
                f"{client!r} left the run {self._run_id!r} for good; to take it in again, start the server again "
                "with --resume."
            )
        self._agent_ids[client] = agent_id.hex()

    def check(self, client: str, agent_id: bytes) -> None:
        """Check that a call comes from the agent that joined under this name.

        Raises:
            RoundLost: If nobody has joined under the name.
            JoinRefused: If it was another agent.
        """
        known = self._agent_ids.get(client)
        if known is None:
            raise RoundLost(f"{client!r} has not joined this run; join first.")
        if known != agent_id.hex():
            raise JoinRefused(f"Another agent is called {client!r} in this run.")
